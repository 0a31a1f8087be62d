"""How many floating-point operations a network takes: a multiply-add is 2, products alone are counted."""

from speedrl.models.meissonic import MICRO, MeissonicTransformer


def forward_flops(
    transformer: MeissonicTransformer,
    *,
    batch: int,
    grid: tuple[int, int],
    text: int,
    places: int | None = None,
) -> int:
    """Operations of a forward pass over `batch` rows of grid[0] * grid[1] tokens and `text` words.

    The head runs at `places` of a row, everywhere by default. What PyTorch's own counter counts: matrix products,
    attention's included, and no norm, activation or softmax. A training step is taken as three forward passes (the
    backward pass has two products for each), whatever is computed again to save memory.
    """
    width, codes = transformer.embed.embeddings.embedding_dim, transformer.codes
    pooled = transformer.time_text_embed.text_embedder.linear_1.in_features
    joint = transformer.context_embedder.in_features
    tokens = grid[0] * grid[1]
    inner = tokens // 4 if len(transformer.down_block) else tokens
    both, places, square = inner + text, tokens if places is None else places, width * width

    condition = MICRO * width + pooled * width + (5 * MICRO + pooled) * width + 3 * square
    ends = joint * width * text + square * (tokens + 2 * inner)
    if len(transformer.down_block):
        ends += 4 * square * inner
    if len(transformer.up_block):
        ends += 4 * square * inner
    # projections 4, feed-forward 8, of the picture and of the text by weights of their own; scores and their sum 2
    double = 12 * square * both + 2 * both * both * width + 12 * square
    single = 12 * square * both + 2 * both * both * width + 3 * square
    head = square * places + width * codes * places
    blocks = len(transformer.transformer_blocks) * double + len(transformer.single_transformer_blocks) * single
    return 2 * batch * (condition + ends + blocks + head)
