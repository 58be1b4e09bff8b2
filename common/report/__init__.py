"""What a run did, from its files alone: as text, JSON, one HTML page, and beside other runs.

reading -> summary -> advice and views -> text, as_json, html; compare takes several runs.
"""
