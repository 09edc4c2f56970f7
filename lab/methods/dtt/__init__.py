"""DTT (discrete thinking tokens): a gate mixes hidden states into what is read; HRPO's gate is the other choice (`dtt.md`)."""
