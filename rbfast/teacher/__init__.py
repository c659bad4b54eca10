"""Get solutions (`solutions`) and log-probs (`logprobs`, `server_logprobs`) from a teacher.

A teacher is an OpenAI-compatible server (`client`), a provider with its own API (`providers`) or a local model. A
request for one reply is a job (`jobs`). Jobs are sent one by one (`asking`) or in batches (`batch`, through a
`batch_api`). Replies are parsed (`chat_reply`), stored (`reply_store`) and charged to a budget (`budget`). A server
scores existing text in one of three dialects (`prompt_scores`), asked by several threads (`workers`). `align` maps a
teacher's tokens to the student's.
"""
