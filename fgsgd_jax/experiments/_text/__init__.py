"""Language models on text: data, a small GPT, what its weights live on, its optimizers."""

from ._config import TextConfig as TextConfig
from ._corpus import TextSet as TextSet, hold_out_text as hold_out_text, load_text as load_text
from ._gpt import GPT as GPT, GPTShape as GPTShape, build_gpt as build_gpt
from ._kind import TextKind as TextKind
from ._rules import SCHEMES as SCHEMES, text_rules as text_rules
from ._sample import continued as continued
from ._task import TextTask as TextTask
