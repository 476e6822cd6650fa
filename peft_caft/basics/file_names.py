"""Names of the files that heads, adapters and their cards are made of."""

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
CAFT_CONFIG_NAME = "caft_config.json"
CARD_NAME = "README.md"
PLOT_NAME = "heads.png"
ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
