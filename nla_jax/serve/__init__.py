"""The page that answers a click on a token: `nla serve`.

server.py answers requests; actions.py says what may be asked; worker.py holds the queue and the one thread that uses the
models; models.py reads texts and explains tokens; page.py makes the page of the files in browser/. Another panel is an
action in actions.py and a file in browser/panels/.
"""
