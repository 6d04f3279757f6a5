"""mu, the behavior policy: a fleet of stock SGLang servers, asked over HTTP, and the weights pushed into them."""
