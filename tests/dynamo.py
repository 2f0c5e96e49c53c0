"""What all tests of compiled steps are marked with."""

import pytest

UNDER_COMPILE = [
    pytest.mark.usefixtures("fresh_dynamo"),
    # torch's own compiler, when it looks at a tensor between two graphs.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]
