"""Mamba2 layers (Dao and Gu, 2405.21060), as several families have them."""

from dataclasses import dataclass

from formats.config.base import ModelConfig, Where, key_of, only
from formats.errors import UnsupportedError
from formats.fields import Fields, infinity, shown
from formats.window import in_lanes

NO_LIMIT = [0, infinity("Infinity")]
BEYOND = 1e20  # from here on a number stands for infinity, which is no JSON


@dataclass(frozen=True)
class Mamba2:
    """Heads whose state [state_size, head_dim] decays by head; groups of heads share what is written and read under."""

    num_heads: int
    head_dim: int
    state_size: int
    n_groups: int
    conv_kernel: int
    conv_bias: bool

    @property
    def width(self) -> int:
        """Of what a token writes, and of its gate."""
        return self.num_heads * self.head_dim

    @property
    def conv_channels(self) -> int:
        """x, B and C side by side."""
        return self.width + 2 * self.n_groups * self.state_size

    @property
    def projected(self) -> int:
        """Rows of in_proj: z, then x, B and C, then a step of time per head."""
        return self.width + self.conv_channels + self.num_heads

    @property
    def state_values(self) -> int:
        """Recurrent and of the convolution, of one layer."""
        recurrent = self.num_heads * self.state_size * in_lanes(self.head_dim)
        return recurrent + (self.conv_kernel - 1) * self.conv_channels

    @property
    def values_per_token(self) -> int:
        """Activations alive at the widest point."""
        return self.projected + 2 * self.conv_channels + 4 * self.width

    def check(self, model: ModelConfig, where: Where) -> None:
        """Raises FormatError."""
        fits = self.n_groups > 0 and self.num_heads % self.n_groups == 0
        model.require(where, fits, "mamba.n_groups", f"a divisor of {where.key('mamba.num_heads')} {self.num_heads}")
        model.require(where, self.state_size % 2 == 0, "mamba.state_size", "an even number")
        model.require(where, 1 < self.conv_kernel <= 16, "mamba.conv_kernel", "2 to 16")

    @classmethod
    def read(cls, config: Fields) -> "Mamba2":
        """From config.json. Raises FormatError or UnsupportedError naming the key."""
        _check_time_step_limit(config)
        only(config, key_of(config, "mamba_hidden_act", "hidden_act"), "silu")
        heads = config.integer(key_of(config, "mamba_n_heads", "mamba_num_heads"), 1, 2**16)
        return cls(
            heads,
            _read_head_dim(config, heads),
            config.integer(key_of(config, "mamba_d_state", "ssm_state_size"), 1, 2**16),
            config.integer(key_of(config, "mamba_n_groups", "n_groups"), 1, 2**16),
            config.integer(key_of(config, "mamba_d_conv", "conv_kernel"), 2, 16),
            config.boolean(key_of(config, "mamba_conv_bias", "use_conv_bias"), default=True),
        )


def _read_head_dim(config: Fields, heads: int) -> int:
    """Of "auto" the share of a head in mamba_expand times hidden_size (Granite)."""
    key = key_of(config, "mamba_d_head", "mamba_head_dim")
    if config.raw(key) != "auto":
        return config.integer(key, 1, 2**16)
    width = config.integer("mamba_expand", 1, 2**10, default=2) * config.integer("hidden_size", 1, 2**24)
    if width % heads:
        raise config.wrong(key, f"a width, as {heads} heads do not divide {width}")
    return width // heads


def _check_time_step_limit(config: Fields) -> None:
    """Steps of time are not cut. Raises UnsupportedError.

    time_step_min and time_step_max are what training began with. transformers cuts the steps of a prompt by the former,
    and not those of a token alone; no other implementation does (docs/LEARNED.md 95).
    """
    limit = config.items("time_step_limit") if "time_step_limit" in config else NO_LIMIT
    highest = limit[-1] if len(limit) == 2 else None
    unlimited = highest == infinity("Infinity") or (type(highest) is float and highest >= BEYOND)
    if limit[:1] != [0] or not unlimited:
        raise UnsupportedError(f"{config.name('time_step_limit')} is {shown(limit)}, only 0 to infinity is implemented")
