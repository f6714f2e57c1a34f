"""What the tests of the kinds of layers share."""

import pytest


@pytest.fixture
def case(name):
    """The case of that name in `layer_cases.CASES`."""
    from layer_cases import CASES

    # LoRA alone trains, as everywhere.
    case = CASES[name]()
    for module in (case.module, case.oracle):
        for parameter_name, parameter in module.named_parameters():
            parameter.requires_grad_("lora_" in parameter_name)
    return case
