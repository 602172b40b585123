"""Talks to the broker with paho-mqtt: check.py PORT 3.1.1|5. Prints `good`."""

import queue
import sys
import threading

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

PORT = int(sys.argv[1])
V5 = sys.argv[2] == "5"
TIMEOUT = 20


class Peer:
    def __init__(self, client_id, clean=True, will=None):
        self.messages = queue.Queue()
        self.present = None
        self.connected = threading.Event()
        self.subscribed = queue.Queue()
        options = {"protocol": mqtt.MQTTv5} if V5 else {"protocol": mqtt.MQTTv311, "clean_session": clean}
        self.client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id, **options)
        self.client.on_connect = self._on_connect
        self.client.on_subscribe = lambda client, data, mid, codes, properties: self.subscribed.put(codes)
        self.client.on_message = lambda client, data, message: self.messages.put(message)
        if will:
            self.client.will_set(will[0], will[1], qos=1)
        arguments = {}
        if V5:
            properties = Properties(PacketTypes.CONNECT)
            properties.TopicAliasMaximum = 0
            if not clean:
                properties.SessionExpiryInterval = 3600
            arguments = {"clean_start": clean, "properties": properties}
        self.client.connect("127.0.0.1", PORT, **arguments)
        self.client.loop_start()
        assert self.connected.wait(TIMEOUT), "no CONNACK"

    def _on_connect(self, client, data, flags, reason, properties):
        assert not reason.is_failure, reason
        self.present = flags.session_present
        self.connected.set()

    def subscribe(self, topic, qos):
        self.client.subscribe(topic, qos)
        codes = self.subscribed.get(timeout=TIMEOUT)
        assert codes[0].value == qos, codes

    def publish(self, topic, payload, qos, retain=False, properties=None):
        self.client.publish(topic, payload, qos, retain, properties).wait_for_publish(TIMEOUT)

    def message(self):
        return self.messages.get(timeout=TIMEOUT)

    def check(self, topic, payload, qos, retain=False):
        message = self.message()
        got = (message.topic, message.payload, message.qos, message.retain)
        assert got == (topic, payload, qos, retain), (got[0], got[1][:100], got[2:])
        return message

    def disconnect(self):
        self.client.disconnect()
        self.client.loop_stop()

    def vanish(self):
        self.client.loop_stop()
        self.client.socket().close()


publisher = Peer("publisher")
subscriber = Peer("subscriber")
for published in range(3):
    for subscribed in range(3):
        subscriber.subscribe("pairs/+", subscribed)
        publisher.publish("pairs/x", b"text", published)
        subscriber.check("pairs/x", b"text", min(published, subscribed))

publisher.publish("kept", b"retained", 1, True)
subscriber.subscribe("kept", 2)
subscriber.check("kept", b"retained", 1, True)
publisher.publish("kept", b"", 1, True)
subscriber.check("kept", b"", 1)

large = bytes(range(256)) * 4096
subscriber.subscribe("large", 2)
for qos in range(3):
    publisher.publish("large", large, qos)
    subscriber.check("large", large, qos)

subscriber.subscribe("wills", 1)
Peer("mortal", will=("wills", b"gone")).vanish()
subscriber.check("wills", b"gone", 1)

lasting = Peer("lasting", clean=False)
assert not lasting.present
lasting.subscribe("while/away", 2)
lasting.disconnect()
for qos in (1, 2):
    publisher.publish("while/away", str(qos).encode(), qos)
lasting = Peer("lasting", clean=False)
assert lasting.present
for qos in (1, 2):
    lasting.check("while/away", str(qos).encode(), qos)

members = [Peer("one"), Peer("two")]
for member in members:
    member.subscribe("$share/group/jobs", 1)
for job in range(10):
    publisher.publish("jobs", bytes([job]), 1)
jobs = sorted(member.message().payload[0] for member in members for _ in range(5))
assert jobs == list(range(10)), jobs

if V5:
    properties = Properties(PacketTypes.PUBLISH)
    properties.ContentType = "text/plain"
    properties.ResponseTopic = "answers"
    properties.CorrelationData = b"42"
    properties.MessageExpiryInterval = 100
    properties.UserProperty = [("b", "1"), ("a", "2"), ("b", "3")]
    subscriber.subscribe("properties", 1)
    publisher.publish("properties", b"x", 1, properties=properties)
    got = subscriber.check("properties", b"x", 1).properties
    assert got.ContentType == "text/plain" and got.ResponseTopic == "answers" and got.CorrelationData == b"42"
    assert got.UserProperty == [("b", "1"), ("a", "2"), ("b", "3")], got.UserProperty
    assert got.MessageExpiryInterval == 100

print("good")
