"""What a model, a fuser, a training run and an evaluation are: one definition for YAML, the command line and Python."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PositiveInt,
    Tag,
    field_validator,
    model_validator,
)

MAX_LAYERS: Final = 10_000  # of a model: sizes in a file are bounded before anything is made from them


class ModelSpec(BaseModel):
    """Where a causal language model comes from and how it is loaded.

    `source` is a catalogue name, a hub id, a local folder or a GGUF file. `dtype` is a torch dtype name or "auto"
    (float32 on a CPU, bfloat16 on a GPU). `quantization` is "4bit", "8bit" or keyword arguments of a transformers
    quantisation config; the weights are frozen either way.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = Field(description="catalogue name, hub id, folder or GGUF file")
    revision: str | None = Field(None, description="of a hub id: branch, tag or commit")
    gguf_file: str | None = Field(None, description="the GGUF file's name in a repository or folder with several")
    dtype: str = Field("auto", description="a torch dtype's name; auto: float32 on a CPU, bfloat16 on a GPU")
    device: str | None = Field(None, description="such as cuda:1; without it a GPU if there is one")
    device_map: str | dict[str, Any] | None = Field(None, description="several devices, as transformers takes it")
    attn_implementation: str | None = Field(None, description="such as sdpa or eager; transformers chooses without it")
    quantization: str | dict[str, Any] | None = Field(
        None, description="4bit, 8bit or arguments of a transformers quantisation config"
    )
    trust_remote_code: bool = Field(False, description="run the model's own code from its repository")


def is_address(source: object) -> bool:
    """Whether this names a sharer that is served elsewhere (`c2c sharer serve`) and not a model."""
    return isinstance(source, str) and source.startswith(("http://", "https://"))


class ModelIdentity(BaseModel):
    """A model as a fuser sees it: what its cache looks like, and which weights it is.

    `fingerprint` is the hash of `LM.fingerprint`; None when unknown, as may be `num_layers` of a published fuser's.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    name: str
    revision: str | None = None
    fingerprint: str | None = None
    num_layers: int | None = Field(gt=0, le=MAX_LAYERS)
    num_kv_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)

    @property
    def width(self) -> int:
        """Numbers per position, layer and kind (keys or values): KV heads times head size."""
        return self.num_kv_heads * self.head_dim

    @property
    def spec(self) -> ModelSpec:
        """Where the model itself comes from."""
        return ModelSpec(source=self.name, revision=self.revision)


class FuserConfig(BaseModel):
    """What a fuser computes (paper section 3.3). The switches give the paper's ablations.

    `receiver` and `sharer` are filled in by `C2C.from_models`. Defaults of the sizes are the published ones; a variant
    may have defaults of its own for what is not set (`C2CFuser.defaults`).
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    variant: str = Field("c2c", description="what is built and computed: a name of cache2cache.fuser.VARIANTS")
    receiver: ModelIdentity | None = Field(None, description="filled in from the model")
    sharer: ModelIdentity | None = Field(None, description="filled in from the model")
    layer_map: str | list[tuple[int, int]] = Field(
        "terminal",
        description="terminal, last_aligned (as published), k_nearest, or pairs (receiver layer, sharer layer)",
    )
    token_map: Literal["span", "same", "first", "longest"] = Field(
        "span",
        description="which sharer token goes with each receiver token; same (the sharer reads the receiver's tokens), "
        "first and longest are the published maps",
    )
    key_space: Literal["rotated", "unrotated"] = Field(
        "rotated", description="unrotated: keys are fused without their rotary position embedding"
    )
    hidden_dim: int = Field(1024, gt=0, description="width of the hidden states")
    intermediate_dim: int = Field(1024, gt=0, description="inner width of the feed-forward blocks")
    num_layers: int = Field(
        3, ge=2, le=1000, description="depth as published: in and mlp1, num_layers - 2 blocks in the projection"
    )
    dropout: float = Field(0.1, ge=0, lt=1, description="in training, of the feed-forward blocks")
    residual: bool = Field(True, description="add to the receiver's cache; off: replace it (ablation 'project')")
    weighting: bool = Field(True, description="dynamic weight per token and receiver head")
    gating: bool = Field(True, description="learnable gate for the keys and for the values of each layer")
    gate_init: float = Field(0.0, description="initial gate logit; 0 as published")
    gate_noise: Literal["logistic", "gumbel", "none"] = Field(
        "logistic", description="logistic: a Gumbel sigmoid proper; gumbel: one-sided, as published"
    )
    initial_temperature: float = Field(1.0, gt=0, description="of the gates at the first step")
    final_temperature: float = Field(0.001, gt=0, description="of the gates after anneal_steps")
    anneal_steps: int = Field(1929, gt=0, description="steps in which the gates' temperature falls, geometrically")
    normalize: bool = Field(False, description="inputs in units of their channels' deviation, from a calibration pass")
    zero_init: bool = Field(False, description="the output layer starts at zero, so training starts from the receiver")
    projection_init: Literal["random", "ridge"] = Field(
        "random",
        description="ridge: training starts from the linear map that predicts the receiver's cache best, see blend",
    )
    fuse_response: bool = Field(False, description="trained with the answer's tokens fused too (include_response)")
    blend: float = Field(
        1.0, ge=0, le=1, description="ridge, also as a start: how far the prediction replaces the receiver's cache"
    )

    @model_validator(mode="after")
    def _relations(self) -> FuserConfig:
        if self.gating and not self.residual:
            raise ValueError("gating without residual has no closed state to fall back to; set gating to false as well")
        if self.projection_init == "ridge" and (self.variant in ("ridge", "c2c-c") or not self.residual):
            raise ValueError(
                f"projection_init: ridge is for projections that read both caches and are added to the receiver's, not "
                f"for variant {self.variant}{'' if self.residual else ' without residual'}; leave it out"
            )
        if self.final_temperature > self.initial_temperature:
            raise ValueError(
                f"final_temperature {self.final_temperature} is above initial_temperature {self.initial_temperature}; "
                "the gate temperature is annealed downwards"
            )
        return self

    @property
    def moves_tokens(self) -> bool:
        """Whether the token map gives prompts tokens and positions that no answer and no store has: first, longest."""
        return self.token_map in ("first", "longest")


class _Places(BaseModel):
    """With "~" in its paths as a shell would read it."""

    @field_validator("*")
    @classmethod
    def _at_home(cls, value: Any) -> Any:
        if isinstance(value, list):
            return [cls._at_home(entry) for entry in value]
        if isinstance(value, str) and value.startswith("~/"):  # questions of one's own stand where a set's name does
            return os.path.expanduser(value)
        return value.expanduser() if isinstance(value, Path) else value


class DataSource(_Places):
    """One source of training examples: a question set (`task`) or instruction data (`rows` on the hub or `jsonl`)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    task: str | None = Field(None, description="a question set of cache2cache.tasks, such as arc-easy")
    rows: str | None = Field(None, description="instruction data, owner/name[/config]")
    jsonl: Path | None = Field(None, description="instruction data, a local file, .jsonl or .jsonl.gz")
    split: str = Field("train", description="split of a question set or of rows on the hub")
    limit: int | None = Field(None, gt=0, description="that many rows of those that fit; all without it")
    take: Literal["random", "first"] = Field(
        "random", description="which rows a limit takes; random: drawn with the run's seed"
    )
    weight: float | None = Field(
        None, gt=0, description="share of the training examples among the weights; rows repeat or are drawn"
    )
    supervise: Literal["last", "all"] = Field(
        "last", description="which assistant turns of a chat are learned; all: each is an example of its own"
    )
    on_bad_rows: Literal["error", "skip"] = Field("error", description="skip: leave them out, with a warning")
    max_prompt_chars: int | None = Field(None, gt=0, description="leave out rows with longer prompts")
    max_response_chars: int | None = Field(None, gt=0, description="cut responses there, at a word")

    @model_validator(mode="after")
    def _one(self) -> DataSource:
        if sum(x is not None for x in (self.task, self.rows, self.jsonl)) != 1:
            raise ValueError("give exactly one of task, rows and jsonl")
        if self.rows and not (2 <= len(parts := self.rows.split("/")) <= 3 and all(parts)):
            raise ValueError("rows is owner/name or owner/name/config")
        return self

    @property
    def name(self) -> str:
        """What the ids of its examples start with. Rows of two splits are not the same ones; those of LongBench, which
        are all in its split test, have been known without it."""
        rows = self.rows and (self.rows if self.split in ("train", "test") else f"{self.rows}@{self.split}")
        return str(self.task or rows or self.jsonl)


class LoraSpec(BaseModel):
    """The adapter of the baseline `single` (LoRA, through PEFT)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    rank: int = Field(16, gt=0, description="of the two matrices' product")
    alpha: float = Field(32, gt=0, description="the adapter's output is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="of the adapter's input")
    target_modules: str | list[str] = Field(
        "all-linear",
        description="the receiver's layers that have one, as PEFT names them; all-linear: all but its head",
    )


class FuserSource(BaseModel):
    """Where a trained fuser is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = Field(description="a folder, a hub id or the name of one that comes packaged")
    revision: str | None = Field(None, description="of a hub id: branch, tag or commit")
    subfolder: str | None = Field(None, description="where in the folder or repository the fuser is")

    @property
    def named(self) -> str:
        """What an error calls it."""
        return self.source if self.subfolder is None else f"{self.source}, {self.subfolder}"


T = TypeVar("T")
COUNTS: Final = ("one", "several")  # which an error's place names
OneOrSeveral = Annotated[
    Annotated[T, Tag("one")] | Annotated[list[T], Field(min_length=1), Tag("several")],
    Discriminator(lambda given: COUNTS[isinstance(given, (list, tuple))]),
]


class TrainConfig(_Places):
    """A training run, as written in a recipe."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    receiver: ModelSpec = Field(description="the model that answers")
    sharer: OneOrSeveral[ModelSpec] = Field(
        description="the model whose cache is fused into the receiver's, or a list of models: each then has a fuser of "
        "its own, trained together on the sum of their changes"
    )
    fuser: FuserConfig = Field(FuserConfig(), description="what is trained, for each of several sharers")
    start_from: OneOrSeveral[str | FuserSource | None] = Field(
        None,
        description="a fuser to go on from in place of new weights: a folder, a hub id or one that comes packaged, or "
        "{source, revision, subfolder}; for several sharers a list, null for a new one",
    )
    data: list[DataSource] = Field(min_length=1, description="sources of examples, counted from 0")
    method: Literal["c2c", "single", "identical"] = Field(
        "c2c",
        description="c2c: a fuser; and the paper's baselines: single, the receiver alone with a LoRA adapter; "
        "identical, a fuser with the receiver as its own sharer. Both need no sharer and put the receiver in its place",
    )
    lora: LoraSpec = Field(LoraSpec(), description="the adapter of the method single")
    data_dir: Path | None = Field(None, description="local mirror of the data sets; the hub without it")
    store: OneOrSeveral[Path] | None = Field(
        None,
        description="sharer prefills made by c2c precompute, for several sharers a list with a folder for each; "
        "without it they are computed live",
    )
    receiver_store: Path | None = Field(
        None, description="the receiver's prefills, made by c2c precompute too; without it they are computed live"
    )
    output: Path = Field(Path("runs/fuser"), description="folder of the run")
    epochs: int = Field(1, gt=0, description="passes over the examples")
    max_steps: int | None = Field(None, gt=0, description="end after that many steps, in whichever epoch")
    batch_size: int = Field(16, gt=0, description="examples a step, over all processes")
    accumulate: int = Field(1, gt=0, description="parts that a process's share of a batch is computed in, one by one")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="what the fuser computes in, its weights being float32, and the dtype of models that name none. "
        "auto: bfloat16 on a GPU, float32 on a CPU",
    )
    shard: bool = Field(
        False, description="spread the frozen models over the processes, for those too large for one GPU (FSDP2)"
    )
    learning_rate: float = Field(1e-4, gt=0, description="highest rate of AdamW")
    warmup: float = Field(0.1, ge=0, le=1, description="share of the steps in which the rate rises")
    schedule: Literal["linear", "cosine"] = Field("linear", description="how the rate falls to zero after that")
    weight_decay: float = Field(0.01, ge=0, description="of AdamW")
    decay: Literal["matrices", "all"] = Field("matrices", description="which parameters weight_decay is on")
    gate_learning_rate: float | None = Field(None, gt=0, description="of the gate logits, where it should differ")
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    loss: Literal["token", "example", "sum"] = Field(
        "token",
        description="token: mean over all response tokens; example: mean over the means of the responses; sum: mean "
        "over the sums of the responses",
    )
    distill: float = Field(
        0.0,
        ge=0,
        description="weight of the divergence from the sharer's next-token distributions (one sharer, models of one "
        "vocabulary)",
    )
    max_tokens: int = Field(2048, gt=1, description="of prompt and response")
    too_long: Literal["cut", "drop"] = Field(
        "cut", description="cut: a longer response loses its end; drop: the example is left out"
    )
    min_response_tokens: int = Field(
        1, gt=0, description="an example whose prompt leaves less room for a response that is cut is left out"
    )
    truncate: Literal["none", "oldest"] = Field(
        "none", description="oldest: first drop the oldest turns of a chat that is too long, but for the system message"
    )
    calibration_prompts: int = Field(
        64, gt=0, description="prompts for the statistics of a fuser with normalize, and for a start from ridge"
    )
    holdout: int = Field(
        64, ge=0, description="examples kept out of training to watch the loss on, by their ids' hashes"
    )
    evaluate_every: int = Field(50, gt=0, description="steps between looks at the hold-out")
    patience: int | None = Field(
        None, gt=0, description="stop after that many evaluations in a row without a lower loss on the hold-out"
    )
    keep: Literal["last", "best"] = Field(
        "last", description="which fuser the run leaves: the last one, or that of the lowest loss on the hold-out"
    )
    save_every: int = Field(50, gt=0, description="steps between checkpoints")
    trackers: list[Literal["tensorboard"]] = Field([], description="who else gets the log, under output")
    seed: int = Field(42, ge=0, lt=2**32, description="of draws, order, first weights and noise")
    data_seed: int | None = Field(
        None,
        ge=0,
        lt=2**32,
        description="draws and mixes rows in place of seed, so that runs of several seeds read one store",
    )
    weights_on_disk: Literal["float32", "bfloat16"] = Field("bfloat16", description="type of the fuser that is left")

    @property
    def sharers(self) -> list[ModelSpec]:
        return self.sharer if isinstance(self.sharer, list) else [self.sharer]

    @property
    def starts(self) -> list[FuserSource | None]:
        """For each sharer the fuser to go on from, or none."""
        if self.start_from is None:
            return [None] * len(self.sharers)
        given = self.start_from if isinstance(self.start_from, list) else [self.start_from]
        return [FuserSource(source=start) if isinstance(start, str) else start for start in given]

    @property
    def stores(self) -> list[Path]:
        """One for each sharer, or none."""
        if self.store is None:
            return []
        return self.store if isinstance(self.store, list) else [self.store]

    @property
    def drawn_by(self) -> int:
        """The seed that rows are drawn with."""
        return self.seed if self.data_seed is None else self.data_seed

    @model_validator(mode="before")
    @classmethod
    def _no_sharer(cls, given: Any) -> Any:
        """The baselines' sharer is the receiver, whatever the recipe names; without a sharer there is no store."""
        if isinstance(given, dict) and given.get("method") in ("single", "identical") and "receiver" in given:
            given = {**given, "sharer": given["receiver"]}
            if given["method"] == "single":
                given["store"] = given["receiver_store"] = None
        return given

    @model_validator(mode="after")
    def _trainable(self) -> TrainConfig:
        if len({source.weight is None for source in self.data}) > 1:
            raise ValueError("give a weight to every source of data or to none")
        if self.min_response_tokens >= self.max_tokens:
            raise ValueError("min_response_tokens leaves no room for a prompt; it must be below max_tokens")
        if self.fuser.moves_tokens:
            raise ValueError(
                f"training is on the token maps span and same, not yet on {self.fuser.token_map}; leave token_map out"
            )
        if self.fuser.fuse_response:
            raise ValueError("training fuses the prompt, not yet the answer; leave fuse_response out")
        several = len(self.sharers)
        if self.store is not None and len(self.stores) != several:
            raise ValueError(
                f"store names {len(self.stores)} folders for {several} sharers; give each sharer one, in the same order"
            )
        if len(self.starts) != several:
            raise ValueError(
                f"start_from names {len(self.starts)} fusers for {several} sharers; give each sharer one, or null, in "
                "the same order"
            )
        if any(start is not None and not start.source for start in self.starts):
            raise ValueError("start_from is empty; name a fuser, or leave it out (null) for a new one")
        if self.start_from is not None and self.method == "single":
            raise ValueError("start_from is a fuser, and method: single trains none; leave it out")
        if several > 1 and self.distill:
            raise ValueError(f"distill is towards one sharer, {several} are given; leave it out")
        if several > 1 and not self.fuser.residual:
            raise ValueError(
                "several sharers' changes are summed; residual: false replaces, so that only one would last"
            )
        if self.shard and self.method == "single":
            raise ValueError("shard is for frozen models, and method: single trains its receiver; leave shard out")
        if self.shard and (quantized := [spec.source for spec in (self.receiver, *self.sharers) if spec.quantization]):
            raise ValueError(f"shard takes whole weights, {quantized[0]} is quantized; leave one of the two out")
        if self.fuser.projection_init == "ridge" and self.calibration_prompts < 2:
            raise ValueError(
                "projection_init: ridge is fitted on some of the calibration prompts and chosen on others; set "
                "calibration_prompts to 2 or more, some hundreds for a good start"
            )
        if self.accumulate > self.batch_size:
            raise ValueError(f"a batch of {self.batch_size} can't be computed in {self.accumulate} parts")
        if self.holdout == 0 and (self.patience is not None or self.keep == "best"):
            raise ValueError("patience and keep: best look at the hold-out, which is empty; set holdout")
        return self


class EvalTask(BaseModel):
    """One set of questions of an evaluation. In a recipe its name alone will do."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: str = Field(description="a name of cache2cache.tasks, or the path of a .jsonl of one's own")
    name: str | None = Field(None, description="what the results call it; the task's name without it")
    split: str | None = Field(None, description="instead of the run's")
    limit: int | None = Field(None, gt=0, description="instead of the run's")
    limits: dict[str, PositiveInt] = Field({}, description="instead of the run's")
    max_prompt_tokens: int | None = Field(
        None, gt=1, description="cut the middle out of longer questions, those answered in words, for every model"
    )
    shots_task: str | None = Field(None, description="where the examples of few-shot come from; the task itself")
    shots_split: str | None = Field(None, description="their split; train, of own rows the rows themselves")

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, given: Any) -> Any:
        return {"task": given} if isinstance(given, str) else given

    @property
    def label(self) -> str:
        """What the results call it."""
        return self.name or self.task


class RouterConfig(BaseModel):
    """The learned router: which of the questions go to the sharer."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    tasks: list[EvalTask] = Field(
        [], description="questions to learn from; without any the run's own tasks, in their split train"
    )
    limit: int = Field(400, gt=1, description="that many of each, drawn with the run's seed")
    share: float = Field(0.5, ge=0, le=1, description="of a set's questions that go to the sharer, by either router")
    penalty: float = Field(1.0, gt=0, description="on the squared weights of the regression, whose inputs are whitened")


class EvalConfig(_Places):
    """An evaluation, as written in a recipe or given by options."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    fuser: list[str | None] = Field([None], description="folder or hub id, a list for several sharers; the packaged")
    subfolder: list[str | None] = Field([None], description="where in it the fuser is; a list for several sharers")
    receiver: str | None = Field(None, description="instead of the fuser's own")
    receiver_dtype: str = Field("auto", description="what the receiver computes in")
    sharer: list[str | None] = Field([None], description="instead of the fuser's own; a list for several")
    sharer_dtype: str = Field("auto", description="what the sharers compute in")
    mode: Literal["parallel", "sequential"] = Field("parallel", description="how several sharers are fused")
    tasks: list[EvalTask] = Field(
        [EvalTask(task="arc-easy"), EvalTask(task="openbookqa")], min_length=1, description="what is asked"
    )
    split: str = Field("validation", description="of the question sets; without it, of those that lack it, their own")
    data_dir: Path | None = Field(None, description="local mirror of the data sets; the hub without it")
    prompt: str = Field("paper", description="how a question with options is put: paper, short, chinese, cot")
    methods: list[str] = Field(
        ["receiver", "sharer", "c2c", "other"], min_length=1, description="who answers, see docs/evaluation.md"
    )
    answers: Literal["likelihood", "generation", "both"] = Field(
        "likelihood", description="by the likeliest option, in words, or both; without options always in words"
    )
    limit: int | None = Field(
        None, gt=0, description="that many questions of each set, drawn with the seed; fewer are among more"
    )
    limits: dict[str, PositiveInt] = Field({}, description="METHOD: NUMBER, fewer questions for methods that take long")
    batch_size: int = Field(16, gt=0, description="questions at once, of like length")
    max_new_tokens: int = Field(64, gt=0, description="of answers in words to questions with options")
    skip: float | None = Field(None, ge=0, le=1, description="threshold of the method skip")
    single: Path | None = Field(None, description="adapter of the method single")
    identical: str | None = Field(None, description="fuser of the method self, trained with method: identical")
    shots: int = Field(5, gt=0, description="examples of the method few-shot")
    router: RouterConfig = Field(RouterConfig(), description="of the methods route and route-confidence")
    store: list[Path] = Field([], description="prefill store, one for each sharer, filled where they lack something")
    store_precision: str | None = Field(None, description="of a new store, bfloat16 or int8; bfloat16")
    max_gb: float = Field(20.0, ge=0, description="refuse to put more than that into a store")
    timing: int = Field(0, ge=0, description="clock so many questions, one by one; 0: no clock")
    seed: int = Field(0, ge=0, lt=2**32, description="of the questions drawn, of noise and of resampling")
    output: Path = Field(Path("runs/evaluation"), description="folder for samples, summary and report")
    results: Path | None = Field(None, description="folder that also gets numbers and ids, without any text")

    @field_validator("fuser", "subfolder", "sharer", "store", mode="before")
    @classmethod
    def _one_alone(cls, given: Any) -> Any:
        return given if isinstance(given, list) else [given]

    @model_validator(mode="after")
    def _labels(self) -> EvalConfig:
        labels = [task.label for task in self.tasks]
        if twice := [label for label in labels if labels.count(label) > 1]:
            raise ValueError(f"two tasks are called {twice[0]}; give one of them a name")
        return self
