"""Inputs in the data formats of `complicate_input`: what a rewritten instruction may carry (WizardLM, §3.2)."""

EXAMPLES: dict[str, str] = {
    "XML": """Add up the prices of all books in this catalog that are in stock:
<catalog>
  <book title="Harbor Lights" price="12.50" stock="3"/>
  <book title="The Long Field" price="8.00" stock="0"/>
  <book title="Salt and Stone" price="15.25" stock="7"/>
</catalog>""",
    "SQL": """What is wrong with this query if I want each customer's newest order only, and how would you mend it?
SELECT customer_id, MAX(ordered_at), total
FROM orders
GROUP BY customer_id;""",
    "Python": """Explain why this function returns the wrong list when it is called again, and rewrite it:
def collect(item, found=[]):
    found.append(item)
    return found""",
    "HTML": """Turn this list into a table with the headings "Day" and "Opening hours":
<ul>
  <li>Monday: 9 to 17</li>
  <li>Tuesday: closed</li>
  <li>Saturday: 10 to 14</li>
</ul>""",
    "shell": """This script should delete logs older than a week but removed everything. Correct it:
cd /var/log/app
find . -name "*.log" -mtime 7 -o -exec rm {} \\;""",
    "JSON": """Which of these sensors should be replaced first, given that readings above 80 damage them?
{"sensors": [
  {"id": "a1", "readings": [71, 83, 90]},
  {"id": "b4", "readings": [64, 66, 81]},
  {"id": "c2", "readings": [85, 88, 91]}
]}""",
}
