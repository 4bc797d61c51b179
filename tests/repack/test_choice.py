"""Which GGUF files of a repository are meant."""

import pytest

from formats.errors import RequestError
from repack.sources.choice import choose_gguf, split_choice

NAMES = [
    "README.md",
    "mmproj-F16.gguf",
    "Model-30B-Q4_K_M.gguf",
    "Model-30B-UD-Q4_K_XL.gguf",
    "Model-30B-Q8_0.gguf",
    "BF16/Model-30B-BF16-00001-of-00002.gguf",
    "BF16/Model-30B-BF16-00002-of-00002.gguf",
]


def test_a_choice_stands_after_a_colon() -> None:
    assert split_choice("org/name:Q4_K_M") == ("org/name", "Q4_K_M")
    assert split_choice("org/name") == ("org/name", None)


@pytest.mark.parametrize(
    ("choice", "pattern", "found"),
    [
        ("Q4_K_M", None, NAMES[2:3]),
        ("q8_0", None, NAMES[4:5]),
        ("UD-Q4_K_XL", None, NAMES[3:4]),
        ("BF16", None, NAMES[5:]),
        (None, "BF16/*", NAMES[5:]),
        (None, "*Q4_K_M*", NAMES[2:3]),
    ],
)
def test_one_model_is_chosen_with_all_its_parts(choice: str | None, pattern: str | None, found: list[str]) -> None:
    assert choose_gguf(NAMES, "org/name", choice, pattern) == found


@pytest.mark.parametrize(
    "choice", ["Q2_K", "Q3_K_M", "IQ4_XS", "IQ4_NL", "IQ1_M", "UD-Q2_K_XL", "UD-IQ2_XXS", "UD-IQ1_S", "UD-TQ1_0"]
)
def test_small_quantizations_are_chosen_by_name_and_no_longer_one_instead(choice: str) -> None:
    others = ["Q2_K_L", "Q3_K_S", "UD-IQ3_XXS", "UD-IQ1_M_X"]
    names = [f"{name}/Model-{name}-0000{nth}-of-00002.gguf" for name in (*others, choice) for nth in (1, 2)]
    assert choose_gguf(names, "org/name", choice, None) == names[-2:]


def test_without_a_choice_all_are_listed() -> None:
    with pytest.raises(RequestError) as error:
        choose_gguf(NAMES, "org/name", None, None)
    assert str(error.value) == (
        "org/name: holds 4 GGUF models; choose one with org/name:NAME or --file GLOB: "
        "BF16/Model-30B-BF16, Model-30B-Q4_K_M, Model-30B-Q8_0, Model-30B-UD-Q4_K_XL"
    )


def test_a_choice_that_means_none_or_several_lists_what_there_is() -> None:
    with pytest.raises(RequestError, match=r"0 of its models are called :Q2_K; .*Model-30B-Q8_0"):
        choose_gguf(NAMES, "org/name", "Q2_K", None)
    with pytest.raises(RequestError, match=r"2 of its models are called --file \*Q4\*; .*Q4_K_M, Model-30B-UD-Q4_K_XL"):
        choose_gguf(NAMES, "org/name", None, "*Q4*")


def test_the_only_model_needs_no_choice() -> None:
    assert choose_gguf(["a.gguf", "mmproj-a.gguf"], "org/name", None, None) == ["a.gguf"]
