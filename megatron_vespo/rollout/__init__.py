"""mu, the behavior policy: a stock SGLang server as its own process, its client, and the weights pushed into it."""
