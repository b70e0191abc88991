"""Whether the actors that share a card fit in its memory."""

PROCESS_BYTES = 500_000_000  # about the size of a CUDA context and torch's libraries on a card, for each process


def memory_warning(actor_bytes: int, card_bytes: int, *, num_gpus: float, most_actors: int) -> str | None:
    """Return a warning, with figures and the way out, if a card's actors seem to need more memory than it has.

    Args:
        actor_bytes: of an actor's tensors (minimizing_bytes()).
        card_bytes: of one card.
        num_gpus: of an actor; several share a card if it is half or less.
        most_actors: at a time, on the whole cluster.
    """
    num = min(int(1 / min(num_gpus, 1.0) + 1e-9), most_actors)
    needed = num * (actor_bytes + PROCESS_BYTES)
    if needed <= card_bytes:
        return None
    actors = "1 actor takes" if num == 1 else f"{num} actors of {num_gpus:g} GPU each take"
    fewer = "larger actors.num_gpus, a " if num > 1 else ""
    return (
        f"{actors} an estimated {needed / 1e9:.2f} GB of a card's {card_bytes / 1e9:.2f} GB "
        f"({actor_bytes / 1e9:.2f} GB of examples, weights and activations each, and {PROCESS_BYTES / 1e9:.1f} GB of "
        f"CUDA's own): give a {fewer}smaller minimize.batch_size or smaller subsets"
    )
