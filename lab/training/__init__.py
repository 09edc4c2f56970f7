"""What trainings are made of: transformers' and TRL's trainers driven our way, optimizers, sharing of memory, the guard."""
