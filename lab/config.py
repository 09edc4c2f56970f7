"""Typed, strict settings: an unknown name or a wrong type is an error before anything expensive starts."""

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from lab.errors import SettingsError, unknown


class Settings(BaseModel):
    """Base of every settings class: frozen, no unknown names, no silent conversions (an int may stand for a float)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, arbitrary_types_allowed=True)

    @classmethod
    def check(cls, **values: Any) -> Self:
        """Settings made of `values` over the defaults; raises SettingsError naming the closest match or the bad value."""
        for name in values:
            if name not in cls.model_fields:
                raise unknown(f"{cls.__name__} setting", name, cls.model_fields)
        try:
            return cls(**values)
        except ValidationError as error:
            raise SettingsError(_sentence(cls, error)) from None

    def but(self, **changes: Any) -> Self:
        """A checked copy with `changes`."""
        return self.check(**{**{name: getattr(self, name) for name in type(self).model_fields}, **changes})


def _sentence(cls: type[Settings], error: ValidationError) -> str:
    problems = []
    for item in error.errors():
        place = ".".join(map(str, item["loc"])) or "settings"
        message = item["msg"].removeprefix("Value error, ")
        problems.append(f"{place} = {item.get('input')!r}: {message[:1].lower()}{message[1:]}" if item["loc"] else message)
    return f"{cls.__name__}: " + "; ".join(problems) + "."
