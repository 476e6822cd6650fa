"""``python -m peft_caft.cli``, which ``accelerate launch -m`` starts."""

from . import main

main()
