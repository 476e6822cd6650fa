"""Makes ``CAFT`` a PEFT method: the one place where a table of another library is extended.

``register_peft_method`` (huggingface/peft#2282, unchanged in 0.21) refuses a name that the enum
``PeftType`` lacks, so the member is added by hand, once. A member is a ``str``, hence
``str.__new__``.
"""

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType, register_peft_method

NAME = "CAFT"


def peft_type() -> PeftType:
    """The ``PeftType.CAFT`` member, added to the enum on the first call."""
    if NAME not in PeftType.__members__:
        member = str.__new__(PeftType, NAME)
        member._name_ = member._value_ = NAME
        member._sort_order_ = len(PeftType.__members__)
        PeftType._member_map_[NAME] = PeftType._value2member_map_[NAME] = member
        PeftType._member_names_.append(NAME)
        type.__setattr__(PeftType, NAME, member)
    return PeftType.__members__[NAME]


def register(config_cls: type, model_cls: type) -> None:
    """Register configuration and tuner with PEFT; like AdaLoRA, CAFT keeps LoRA's prefix."""
    if peft_type() not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name=NAME.lower(), config_cls=config_cls, model_cls=model_cls, prefix="lora_")
