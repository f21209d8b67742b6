"""How many tokens a second a hybrid generates: prompts of different lengths alone, and in a batch.

    python tests/throughput.py
    python tests/throughput.py --prompts 3 --new 8

The hybrid is the bundled teacher's with three full layers of twelve, untrained. The tokens of both
ways are equal, or the script fails."""
import argparse
import time

import torch

import flashmorph as fm

LAYERS = (1, 4, 8)


def prompts(count: int, vocabulary: int) -> list[torch.Tensor]:
    "Random prompts of 16, 32, 48, ... tokens."
    generator = torch.Generator().manual_seed(0)
    lengths = range(16, 16 * (count + 1), 16)
    return [torch.randint(3, vocabulary, (T,), generator=generator) for T in lengths]


def alone(hybrid, rows: list[torch.Tensor], **options) -> torch.Tensor:
    "What follows each prompt, one prompt at a time."
    return torch.cat([hybrid.generate(row[None], **options)[:, len(row):] for row in rows])


def together(hybrid, rows: list[torch.Tensor], **options) -> torch.Tensor:
    "What follows each prompt, in one batch that is padded on the left."
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, -len(row):] = row
        mask[i, -len(row):] = 1
    return hybrid.generate(ids, attention_mask=mask, **options)[:, longest:]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--new", type=int, default=64, help="tokens to generate for each prompt")
    args = parser.parse_args(arguments)
    teacher, _ = fm.load_teacher()
    torch.manual_seed(0)
    hybrid = fm.morph(teacher).commit(LAYERS)
    rows = prompts(args.prompts, hybrid.config.vocab_size)
    options = {"max_new_tokens": args.new, "do_sample": False, "eos_token_id": None}
    alone(hybrid, rows[:1], **options)
    # one after the other, then all at once
    found = []
    for way in (alone, together):
        start = time.perf_counter()
        found.append(way(hybrid, rows, **options))
        seconds = time.perf_counter() - start
        print(f"{way.__name__}: {found[-1].numel() / seconds:.0f} tokens/s")
    assert torch.equal(*found), "the batch generates other tokens"


if __name__ == "__main__": main()
