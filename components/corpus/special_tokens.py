"""The special tokens, in the order of their ids after the ordinary vocabulary, as in Qwen's tokenizers."""

from __future__ import annotations

from typing import Final

END_OF_TEXT: Final = "<|endoftext|>"
TURN_START: Final = "<|im_start|>"
TURN_END: Final = "<|im_end|>"
