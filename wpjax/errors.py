"""What a user did that cannot work: one line that says what is wrong, where, and how to mend it.

Everything the package raises on purpose is a `WpjaxError`; the command line prints its text and exits with 2.
Any other exception is a bug.
"""


class WpjaxError(ValueError):
    """Bad input; the message is a single line that also says how to mend it."""


class CheckpointError(WpjaxError):
    """A model folder or file that is missing, damaged, or not what its configuration says."""


class ConfigError(CheckpointError):
    """A model configuration this decoder does not implement, or does not know."""


class PairError(WpjaxError):
    """Two checkpoints that cannot be a base and an expert of one architecture."""


class ComponentError(WpjaxError):
    """A component name or kind that the model does not have."""


class BehaviourError(WpjaxError):
    """Prompts, an instruction or a checker that cannot be used."""


class MetricRejected(WpjaxError):
    """The metric does not separate expert from base on these prompts; the message gives the figure."""


class AnchorRejected(MetricRejected):
    """The anchor does not separate expert from base; the message names the test that failed and its figure."""


class OutputError(WpjaxError):
    """A place that results cannot be written to."""
