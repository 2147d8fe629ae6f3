"""Solutions in other styles, right and wrong: what proves that a check judges behaviour and not wording.

Each topic's module has four tables, by exercise number:

    RIGHT       at least three right solutions that differ from each other and from the reference
    AGAIN       misconceptions written a second time, differently: {misconception's name: subject}
    BOTH        subjects with two mistakes at once: [({names}, subject)]
    EQUIVALENT  mutants of the author's solution that are no mistakes (docs/proofs.md): {"old -> new": the reason}

They are no part of what is installed from a wheel; the proofs and the records are made with them.
"""
