import os

# No test talks to a model hub; TRL's notices about its experimental options are not ours to show.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
