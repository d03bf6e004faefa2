"""Sessions of the Python package stomp.py against the broker at 127.0.0.1:PORT: stomp_py.py PORT."""

import queue
import sys
import time

import stomp

PORT = int(sys.argv[1])
CONNECTIONS = {"1.0": stomp.Connection10, "1.1": stomp.Connection11, "1.2": stomp.Connection12}


class Heard(stomp.ConnectionListener):
    def __init__(self):
        self.messages = queue.Queue()
        self.receipts = queue.Queue()
        self.errors = queue.Queue()
        self.ended = queue.Queue()
        self.beats = 0

    def on_message(self, frame):
        self.messages.put(frame)

    def on_receipt(self, frame):
        self.receipts.put(frame.headers["receipt-id"])

    def on_error(self, frame):
        self.errors.put(frame)

    def on_disconnected(self):
        self.ended.put(True)

    def on_heartbeat(self):
        self.beats += 1

    def body(self):
        return self.messages.get(timeout=20).body


def connect(version, **options):
    connection = CONNECTIONS[version]([("127.0.0.1", PORT)], **options)
    heard = Heard()
    connection.set_listener("heard", heard)
    connection.connect("user", "pass", wait=True)
    return connection, heard


def acknowledge(version, connection, frame, nack=False):
    headers = frame.headers
    call = connection.nack if nack else connection.ack
    if version == "1.2":
        call(headers["ack"])
    elif version == "1.1":
        call(headers["message-id"], headers["subscription"])
    else:
        call(headers["message-id"])


def session(version):
    name = f"/queue/py-{version}"
    connection, heard = connect(version)

    # Automatic; unicode, escapes and headers of one's own.
    connection.subscribe(name, id="1")
    connection.send(name, "grüße", content_type="text/plain", headers={"mine": "a:b\\c" if version != "1.0" else "ab"}, receipt="r1")
    frame = heard.messages.get(timeout=20)
    assert frame.body == "grüße", frame.body
    assert frame.headers["mine"] == ("a:b\\c" if version != "1.0" else "ab"), frame.headers
    assert frame.headers["content-type"] == "text/plain"
    assert frame.headers["destination"] == name
    assert heard.receipts.get(timeout=20) == "r1"
    connection.unsubscribe(id="1")

    # Acknowledged or not: what is not comes again.
    connection.subscribe(name, id="2", ack="client")
    for n in range(3):
        connection.send(name, str(n))
    frames = [heard.messages.get(timeout=20) for _ in range(3)]
    assert [frame.body for frame in frames] == ["0", "1", "2"]
    acknowledge(version, connection, frames[1])
    connection.unsubscribe(id="2")
    connection.subscribe(name, id="3", ack="client-individual" if version != "1.0" else "client")
    frame = heard.messages.get(timeout=20)
    assert frame.body == "2" and frame.headers["redelivered"] == "true", frame
    if version != "1.0":
        acknowledge(version, connection, frame, nack=True)
        frame = heard.messages.get(timeout=20)
        assert frame.body == "2"
    acknowledge(version, connection, frame)

    # Transactions.
    transaction = connection.begin()
    connection.send(name, "never", transaction=transaction)
    connection.abort(transaction)
    transaction = connection.begin()
    connection.send(name, "one", transaction=transaction)
    connection.send(name, "two", transaction=transaction)
    connection.commit(transaction)
    for body in ("one", "two"):
        frame = heard.messages.get(timeout=20)
        assert frame.body == body, frame.body
        acknowledge(version, connection, frame)

    # Topics: two connections get the same.
    other, other_heard = connect(version)
    for c in (connection, other):
        c.subscribe(f"/topic/py-{version}", id="t", receipt="t")
    assert heard.receipts.get(timeout=20) == "t" and other_heard.receipts.get(timeout=20) == "t"
    other.send(f"/topic/py-{version}", "all")
    assert heard.body() == "all" and other_heard.body() == "all"

    # DISCONNECT with a receipt, which stops stomp.py's threads.
    for c, h in ((connection, heard), (other, other_heard)):
        c.disconnect(receipt="bye")
        assert h.receipts.get(timeout=20) == "bye"
        h.ended.get(timeout=20)
        assert h.errors.empty(), h.errors.get()
    print("session", version)


def binary(version):
    connection, heard = connect(version, auto_decode=False)
    connection.subscribe("/queue/bin", id="1")
    body = bytes(range(256)) * 300
    connection.send("/queue/bin", body, content_type="application/octet-stream")
    assert heard.body() == body
    connection.disconnect()
    print("binary", version)


def heart_beats(version):
    connection, heard = connect(version, heartbeats=(300, 300))
    time.sleep(2)
    assert connection.is_connected()
    assert heard.beats >= 3, heard.beats
    connection.subscribe("/queue/beats", id="1")
    connection.send("/queue/beats", "alive")
    assert heard.body() == "alive"
    connection.disconnect()
    print("heart-beats", version, heard.beats)


def errors(version):
    connection, heard = connect(version)
    connection.send_frame("SEND", {"receipt": "wrong"}, "no destination")
    frame = heard.errors.get(timeout=20)
    assert frame.headers["receipt-id"] == "wrong"
    assert "destination" in frame.body
    heard.ended.get(timeout=20)
    print("errors", version)


for version in CONNECTIONS:
    session(version)
    binary(version)
    errors(version)
for version in ("1.1", "1.2"):
    heart_beats(version)
