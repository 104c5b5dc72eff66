"""What the scripted models answer: the content of a request's last message to the answer.

Where a schema decides the answer, no script is needed: tests ask for values of which the schema allows one.
"""

SCRIPTS = {
    "Hello!": "Hello! How can I help you?",
    "Count to twelve.": "One, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve.",
    # JSON without a schema. A grammar lets only the tokenizer's own token stand where one character is
    # possible.
    "Answer in JSON.": ["{", '"colour":', '"red","at":7', "}"],
    # a call that the model decides on, and the answer to its result
    "What is 3 + 4?": '<tool_call>\n{"name": "add", "arguments": {"a": 3, "b": 4}}\n</tool_call>',
    "7": "3 + 4 is 7.",
    # two calls at once, and the answer to the second result
    "What are 2 + 2 and 5 + 6?": "I add twice.\n"
    '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 2}}\n</tool_call>\n'
    '<tool_call>\n{"name": "add", "arguments": {"a": 5, "b": 6}}\n</tool_call>',
    "11": "They are 4 and 11.",
    # a broken call comes back as text
    "Break a call.": '<tool_call>\n{"name": "add", "arguments": {"a" 3}}\n</tool_call>',
}

THINKING_SCRIPTS = {"What is 2 + 2?": "<think>\nTwo and two.\n</think>\n\nIt is 4."}
