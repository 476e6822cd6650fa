"""Makes ``CAFT`` a PEFT method: the one place where a table of another library is extended.

``peft.utils.register_peft_method`` refuses a name that the ``PeftType`` enum lacks, and offers no
way to add one, so the member is added by hand, once. ``PeftType`` mixes in ``str``, hence
``str.__new__``.
"""

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType, register_peft_method

NAME = "CAFT"


def peft_type() -> PeftType:
    """The ``PeftType.CAFT`` member, added to the enum on the first call."""
    if NAME not in PeftType.__members__:
        member = str.__new__(PeftType, NAME)
        member._name_ = NAME
        member._value_ = NAME
        member._sort_order_ = len(PeftType.__members__)
        PeftType._member_map_[NAME] = member
        PeftType._member_names_.append(NAME)
        PeftType._value2member_map_[NAME] = member
        type.__setattr__(PeftType, NAME, member)
    return PeftType.__members__[NAME]


def register(config_cls: type, model_cls: type) -> None:
    """Register the CAFT configuration and tuner with PEFT; the parameters keep LoRA's prefix, as
    AdaLoRA's do.
    """
    if peft_type() not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name=NAME.lower(), config_cls=config_cls, model_cls=model_cls, prefix="lora_")
