"""The page that answers a click on a token: `nla serve`.

server.py answers requests; actions.py says what may be asked; worker.py holds the queue and the one thread that uses the
models. models.py reads texts and explains tokens; claims.py reads what the explanations claim; nearest.py finds training
activations; interventions.py asks the subject itself. page.py makes the page of the files in browser/; export.py and
notebook.py fill it without a server. Another panel is an action in actions.py and a file in browser/panels/.
"""
