"""SoftCoT's file: `projection.bin` alone, for SoftCoT++ with the initial vectors of its sets (`softcot.md` 4)."""

from lab.methods.lta.checkpoint import PROJECTION, OfficialFiles, has_block
from lab.methods.softcot.model import SoftcotModel
from lab.models.layouts import FolderFiles, Layout

MODEL = SoftcotModel


class OfficialProjection(OfficialFiles):
    """A projection without a block; see `OfficialFiles.load`."""

    name = "SoftCoT weights (projection.bin alone)"
    kind = SoftcotModel

    def recognise(self, files: FolderFiles) -> Layout | None:
        """The folder, where there is a projection and no block."""
        return Layout("softcot", self.name) if files.has(PROJECTION) and not has_block(files) else None


RECOGNISERS = [OfficialProjection()]
