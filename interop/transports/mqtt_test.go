package transports_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	mqttserver "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/packets"
	"github.com/stretchr/testify/require"

	"github.com/slotota/ota"
	"github.com/slotota/ota/rpcjson"
	"github.com/slotota/ota/rpcjson/mqtt"
)

// dialMQTT returns a client of ours.
func dialMQTT(t testing.TB, url string, d *mqtt.DialOptions, o *rpcjson.ClientOptions) *rpcjson.Client {
	t.Helper()
	ch, err := mqtt.Dial(t.Context(), url, d)
	require.NoError(t, err)
	c := rpcjson.NewClient(ch, o)
	t.Cleanup(func() { require.NoError(t, c.Close()) })
	return c
}

// online waits until the device answers.
func online(t testing.TB, c *rpcjson.Client) {
	t.Helper()
	require.Eventually(t, func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		return c.Call(ctx, "RPC.Ping", nil, nil) == nil
	}, deadline, poll, "the device does not answer")
}

// brokers runs a test with each broker.
func brokers(t *testing.T, test func(t *testing.T, addr string)) {
	t.Run("mosquitto", func(t *testing.T) { test(t, startMosquitto(t, "", nil).addr) })
	t.Run("mochi", func(t *testing.T) {
		_, addr := startMochi(t)
		test(t, addr)
	})
}

func TestMQTTMethods(t *testing.T) {
	brokers(t, func(t *testing.T, addr string) {
		d := newDevice(t, nil)
		d.serve("mqtt://"+addr, mqtt.ServeOptions{})
		url := "mqtt://" + addr + "/" + deviceID
		c := dialMQTT(t, url, nil, nil)
		online(t, c)
		st, err := c.BootState(t.Context())
		require.NoError(t, err)
		require.True(t, st.Committed)
		var e *rpcjson.Error
		require.ErrorAs(t, c.Call(t.Context(), "Nope", nil, nil), &e)
		require.Equal(t, 404, e.Code)
		everyMethod(t, genuine(t, url, deadline), d)
	})
}

// A whole push by the genuine client, undisturbed and with what may happen.
func TestMQTTPush(t *testing.T) {
	// once changes the first packet that is a write at that offset.
	once := func(offset int, change func(packet) []packet) func(packet) []packet {
		var done atomic.Bool
		return func(p packet) []packet {
			if p.kind() == typePublish && strings.Contains(p.payload(), fmt.Sprintf(`"offset":%d,`, offset)) && done.CompareAndSwap(false, true) {
				return change(p)
			}
			return []packet{p}
		}
	}
	type test struct {
		name string
		down func(w **way) func(packet) []packet // on the device's way from the broker
		// timeout is how long the client waits for a reply; 0 means deadline. None
		// comes to a call that got lost.
		timeout time.Duration
	}
	for _, c := range []test{
		{"undisturbed", func(**way) func(packet) []packet { return nil }, 0},
		{"failed write", func(**way) func(packet) []packet {
			return once(1024, func(p packet) []packet {
				p.body = bytes.Replace(p.body, []byte(`"offset":1024`), []byte(`"offset":1025`), 1)
				return []packet{p}
			})
		}, 0},
		{"lost call", func(**way) func(packet) []packet {
			return once(1024, func(packet) []packet { return nil })
		}, 5 * time.Second},
		{"redelivered", func(**way) func(packet) []packet {
			return once(1024, func(p packet) []packet {
				q := p
				q.head |= 8 // DUP
				return []packet{p, q, q}
			})
		}, 0},
		{"copied", func(**way) func(packet) []packet {
			return once(1024, func(p packet) []packet { return []packet{p, p} })
		}, 0},
		{"connection lost before the call", func(w **way) func(packet) []packet {
			return once(1024, func(packet) []packet { (*w).cut(); return nil })
		}, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			brokers(t, func(t *testing.T, addr string) {
				d := newDevice(t, nil)
				var w *way
				w = newWay(t, addr, nil, c.down(&w))
				d.serve(w.url(), mqtt.ServeOptions{})
				url := "mqtt://" + addr + "/" + deviceID
				online(t, dialMQTT(t, url, nil, nil))
				timeout := c.timeout
				if timeout == 0 {
					timeout = deadline
				}
				require.NoError(t, genuinePush(t, genuine(t, url, timeout), smallZip, 512))
				d.installed()
			})
		})
	}
}

// Our client pushes while its own connection and that of the device break, and
// the broker restarts.
func TestMQTTPushBroken(t *testing.T) {
	zip := readSmall(t)
	m := startMosquitto(t, "", nil)
	d := newDevice(t, nil)
	dw, cw := newWay(t, m.addr, nil, nil), newWay(t, m.addr, nil, nil)
	d.serve(dw.url(), mqtt.ServeOptions{})
	c := dialMQTT(t, cw.url()+"/"+deviceID, nil, &rpcjson.ClientOptions{Timeout: 2 * time.Second})
	online(t, c)
	var at []int64
	step := 0
	require.NoError(t, c.Push(t.Context(), bytes.NewReader(zip), int64(len(zip)), &rpcjson.PushOptions{
		ChunkSize: 256,
		Progress: func(done, _ int64) {
			at = append(at, done)
			switch step++; step {
			case 3:
				cw.cut()
			case 5:
				dw.cut()
			case 7:
				m.stop()
				m.start()
			case 9:
				dw.cut()
				cw.cut()
			}
		},
	}))
	require.True(t, slices.IsSorted(at), "%v", at)
	require.Greater(t, step, 9)
	require.Greater(t, cw.connections(), 2)
	require.Greater(t, dw.connections(), 2)
	d.installed()
}

// What the genuine client sent, byte by byte, and the replies that it got.
func TestMQTTVectors(t *testing.T) {
	var v struct {
		Cases []struct {
			Name    string
			Packets []struct {
				Dir, Type, Topic, Payload, RPC string
				Note                           string `json:"reply_note"`
				Wire                           []byte `json:"wire_b64"`
			}
		}
	}
	readVectors(t, "../../rpcjson/testdata/mqtt.json", &v)
	require.Len(t, v.Cases, 3)
	for _, c := range v.Cases {
		t.Run(c.Name, func(t *testing.T) {
			brokers(t, func(t *testing.T, addr string) {
				d := newDevice(t, nil)
				rpc := ""
				for _, p := range c.Packets {
					if p.RPC != "" {
						rpc = p.RPC
					} else if p.Dir == "broker_to_client" && p.Type == "PUBLISH" {
						var reply struct{ Result json.RawMessage }
						require.NoError(t, json.Unmarshal([]byte(p.Payload), &reply))
						if reply.Result != nil && (rpc == "OTA.GetBootState" || p.Note != "") {
							d.canned(rpc, string(reply.Result)) // other values
						}
					}
				}
				d.serve("mqtt://"+addr, mqtt.ServeOptions{})
				online(t, dialMQTT(t, "mqtt://"+addr+"/"+deviceID, nil, nil))
				conn, err := net.Dial("tcp", addr)
				require.NoError(t, err)
				defer conn.Close()
				require.NoError(t, conn.SetDeadline(time.Now().Add(deadline)))
				r := bufio.NewReader(conn)
				replies := 0
				for _, p := range c.Packets {
					if p.Dir == "client_to_broker" {
						_, err := conn.Write(p.Wire)
						require.NoError(t, err)
						continue
					}
					if p.Type != "PUBLISH" {
						continue // the order of acknowledgements is the broker's
					}
					for {
						got, err := readPacket(r)
						require.NoError(t, err)
						if got.kind() == typePublish {
							require.Equal(t, p.Topic, got.topic())
							require.Equal(t, p.Payload, got.payload())
							require.Zero(t, got.head&1, "retained")
							replies++
							break
						}
					}
				}
				require.Positive(t, replies)
			})
		})
	}
}

// spy is a plain MQTT client of the library in the broker, by which a test
// publishes what no client of ours would, and sees what comes back.
type spy struct {
	t       testing.TB
	publish func(topic, payload string, retain bool)

	mu  sync.Mutex
	got map[string][]string
}

func newSpy(t testing.TB) (*spy, string) {
	t.Helper()
	srv, addr := startMochi(t)
	s := &spy{t: t, got: map[string][]string{}}
	s.publish = func(topic, payload string, retain bool) {
		t.Helper()
		require.NoError(t, srv.Publish(topic, []byte(payload), retain, 1))
	}
	require.NoError(t, srv.Subscribe("#", 1, func(_ *mqttserver.Client, _ packets.Subscription, p packets.Packet) {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.got[p.TopicName] = append(s.got[p.TopicName], string(p.Payload))
	}))
	return s, addr
}

// on returns what came on a topic.
func (s *spy) on(topic string) []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.got[topic])
}

// await waits for n messages on a topic.
func (s *spy) await(topic string, n int) []string {
	s.t.Helper()
	require.Eventually(s.t, func() bool { return len(s.on(topic)) >= n }, deadline, poll, "%d on %s", n, topic)
	return s.on(topic)
}

// settled waits until the device has looked at all that was published to it.
func (s *spy) settled() {
	s.t.Helper()
	s.mu.Lock()
	delete(s.got, "probe/rpc")
	s.mu.Unlock()
	s.publish(deviceID+"/rpc", fmt.Sprintf(`{"id":%d,"src":"probe","method":"RPC.Ping"}`, time.Now().UnixNano()), false)
	s.await("probe/rpc", 1)
}

func TestMQTTTopics(t *testing.T) {
	s, addr := newSpy(t)
	d := newDevice(t, nil)
	count := d.counter("Count")
	d.serve("mqtt://"+addr, mqtt.ServeOptions{StatusTopic: deviceID + "/status"})
	require.Equal(t, []string{"online"}, s.await(deviceID+"/status", 1))
	id := 0
	for _, c := range []struct {
		topic, payload string
		reply          string // of {"id":N,"src":…
		topicOfReply   string
		counts         int
	}{
		{"", `"src":"a","method":"Count"}`, `"dst":"a","result":1}`, "a/rpc", 1},
		{"/Count", `"src":"a"}`, `"dst":"a","result":2}`, "a/rpc", 1},
		{"/count", `"src":"a/b/c","method":"COUNT"}`, `"dst":"a/b/c","result":3}`, "a/b/c/rpc", 1},
		{"/Count", `"src":"a","method":"RPC.List"}`, `"dst":"a","error":{"code":400,"message":"bad request: the topic names another method"}}`, "a/rpc", 0},
		{"/RPC.List", `"src":"a","method":"Count"}`, `"dst":"a","error":{"code":400,"message":"bad request: the topic names another method"}}`, "a/rpc", 0},
		{"/Nope", `"src":"a"}`, `"dst":"a","error":{"code":404,"message":"No handler for Nope"}}`, "a/rpc", 0},
		{"/Count/x", `"src":"a"}`, "", "a/rpc", 0},
		{`/Co"unt`, `"src":"a"}`, "", "a/rpc", 0},
		{"/", `"src":"a"}`, "", "a/rpc", 0},
		// Nowhere to answer.
		{"", `"method":"Count"}`, "", "/rpc", 0},
		{"", `"src":"","method":"Count"}`, "", "/rpc", 0},
		{"", `"src":"#","method":"Count"}`, "", "#/rpc", 0},
		{"", `"src":"a/+","method":"Count"}`, "", "a/+/rpc", 0},
		{"", `"src":"$SYS/x","method":"Count"}`, "", "$SYS/x/rpc", 0},
		{"", `"src":"a\u0000b","method":"Count"}`, "", "a\x00b/rpc", 0},
		{"", `"src":"` + strings.Repeat("x", 600) + `","method":"Count"}`, "", strings.Repeat("x", 600) + "/rpc", 0},
		{"", `"src":"` + deviceID + `/rpc","method":"Count"}`, "", deviceID + "/rpc/rpc", 0},
		// Not for this device, and no requests.
		{"", `"src":"a","dst":"other","method":"Count"}`, "", "a/rpc", 0},
		{"", `"src":"a","result":1}`, "", "a/rpc", 0},
		{"/Count", `"src":"a","result":1}`, "", "a/rpc", 0},
		{"/Count", `"src":"a","error":{"code":1}}`, "", "a/rpc", 0},
	} {
		id++
		before, had := count(), len(s.on(c.topicOfReply))
		s.publish(deviceID+"/rpc"+c.topic, fmt.Sprintf(`{"id":%d,`, id)+c.payload, false)
		s.settled()
		if c.reply != "" {
			got := s.await(c.topicOfReply, had+1)
			require.Equal(t, fmt.Sprintf(`{"id":%d,"src":"esp32_123456",`, id)+c.reply, got[len(got)-1])
		} else {
			require.Len(t, s.on(c.topicOfReply), had, "%+v", c)
		}
		require.Eventually(t, func() bool { return count() == before+c.counts }, deadline, poll, "%+v", c)
	}
	// Without an id nothing is answered; garbage is ignored.
	before := count()
	s.publish(deviceID+"/rpc", `{"method":"Count"}`, false)
	s.publish(deviceID+"/rpc/Count", "", false)
	s.publish(deviceID+"/rpc/Count", " {} ", false)
	for _, bad := range []string{"", "x", "{}", "[]", `{"id":null,"src":"a","method":"Count"}`, "\xff", strings.Repeat("[", 10000)} {
		s.publish(deviceID+"/rpc", bad, false)
		s.publish(deviceID+"/rpc/Nope", bad, false)
	}
	s.settled()
	require.Eventually(t, func() bool { return count() == before+3 }, deadline, poll)
	require.Empty(t, s.on("/rpc"))
}

// A message that is too long is dropped, and does not end the connection: it
// would come again with the next one.
func TestMQTTTooLong(t *testing.T) {
	s, addr := newSpy(t)
	d := newDevice(t, nil)
	w := newWay(t, addr, nil, nil)
	d.serve(w.url(), mqtt.ServeOptions{})
	online(t, dialMQTT(t, "mqtt://"+addr+"/"+deviceID, nil, nil))
	const frame = `{"id":1,"src":"a","method":"RPC.Ping"}`
	s.publish(deviceID+"/rpc", frame+strings.Repeat(" ", rpcjson.DefaultMaxFrame-len(frame)), false)
	s.await("a/rpc", 1)
	for _, n := range []int{1, 2, 70_000, 1 << 20, 20 << 20} {
		s.publish(deviceID+"/rpc", frame+strings.Repeat(" ", rpcjson.DefaultMaxFrame-len(frame)+n), false)
	}
	s.settled()
	require.Len(t, s.on("a/rpc"), 1)
	require.Equal(t, 1, w.connections())

	// The same for replies.
	d.canned("Big", `"`+strings.Repeat("x", 300_000)+`"`)
	c := dialMQTT(t, "mqtt://"+addr+"/"+deviceID, nil, &rpcjson.ClientOptions{MaxReply: 10_000})
	require.ErrorIs(t, c.Call(t.Context(), "Big", nil, nil), ota.ErrTooLarge)
	require.NoError(t, c.Call(t.Context(), "RPC.Ping", nil, nil))
	var text string
	require.NoError(t, dialMQTT(t, "mqtt://"+addr+"/"+deviceID, nil, nil).Call(t.Context(), "Big", nil, &text))
	require.Len(t, text, 300_000)
}

// A retained command is not executed, whenever the device connects; one that is
// published while it listens is, once.
func TestMQTTRetained(t *testing.T) {
	brokers(t, func(t *testing.T, addr string) {
		d := newDevice(t, nil)
		count := d.counter("Count")
		w := newWay(t, addr, nil, nil)
		pub := publisher(t, addr)
		pub(deviceID+"/rpc", `{"id":1,"src":"a","method":"Count"}`, true)
		pub(deviceID+"/rpc/Count", `{"id":2,"src":"a"}`, true)
		d.serve(w.url(), mqtt.ServeOptions{})
		c := dialMQTT(t, "mqtt://"+addr+"/"+deviceID, nil, nil)
		online(t, c)
		require.Zero(t, count())
		pub(deviceID+"/rpc", `{"id":3,"src":"a","method":"Count"}`, true)
		online(t, c)
		require.Eventually(t, func() bool { return count() == 1 }, deadline, poll)
		for i := range 3 {
			w.cut()
			require.Eventually(t, func() bool { return w.connections() == i+2 }, deadline, poll)
			online(t, c)
		}
		require.Equal(t, 1, count())
	})
}

// publisher returns a function that publishes with the genuine MQTT library of
// the package under test, but without its protocol.
func publisher(t testing.TB, addr string) func(topic, payload string, retain bool) {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	require.NoError(t, err)
	t.Cleanup(func() { conn.Close() })
	require.NoError(t, conn.SetDeadline(time.Now().Add(2*deadline)))
	r := bufio.NewReader(conn)
	id := fmt.Sprintf("pub%d", time.Now().UnixNano())
	body := append([]byte("\x00\x04MQTT\x04\x02\x00\x00\x00"), byte(len(id)))
	_, err = conn.Write(packet{0x10, append(body, id...)}.wire())
	require.NoError(t, err)
	p, err := readPacket(r)
	require.NoError(t, err)
	require.Equal(t, []byte{0, 0}, p.body)
	n := uint16(0)
	return func(topic, payload string, retain bool) {
		t.Helper()
		n++
		head := byte(0x32)
		if retain {
			head |= 1
		}
		b := append([]byte{byte(len(topic) >> 8), byte(len(topic))}, topic...)
		b = append(b, byte(n>>8), byte(n))
		_, err := conn.Write(packet{head, append(b, payload...)}.wire())
		require.NoError(t, err)
		p, err := readPacket(r)
		require.NoError(t, err)
		require.EqualValues(t, typePuback, p.kind())
	}
}

// A call whose acknowledgement got lost comes again with the next connection; it
// is executed once, and answered once.
func TestMQTTRedelivery(t *testing.T) {
	brokers(t, func(t *testing.T, addr string) {
		d := newDevice(t, nil)
		count := d.counter("Count")
		var armed, dups atomic.Int32
		w := newWay(t, addr, func(p packet) []packet {
			if p.kind() == typePuback && armed.CompareAndSwap(1, 2) {
				return nil // and then the connection breaks
			}
			return []packet{p}
		}, func(p packet) []packet {
			if p.kind() == typePublish && p.head&8 != 0 {
				dups.Add(1)
			}
			return []packet{p}
		})
		d.serve(w.url(), mqtt.ServeOptions{})
		c := dialMQTT(t, "mqtt://"+addr+"/"+deviceID, nil, nil)
		online(t, c)
		armed.Store(1)
		var n int
		require.NoError(t, c.Call(t.Context(), "Count", nil, &n))
		require.Equal(t, 1, n)
		require.EqualValues(t, 2, armed.Load())
		w.cut()
		online(t, c)
		require.Eventually(t, func() bool { return dups.Load() > 0 }, deadline, poll, "redelivered")
		online(t, c)
		require.Equal(t, 1, count())
	})
}

// The reply goes out over the next connection if this one breaks, once.
func TestMQTTReplyAfterReconnect(t *testing.T) {
	s, addr := newSpy(t)
	d := newDevice(t, nil)
	started, gate := make(chan struct{}), make(chan struct{})
	require.NoError(t, d.srv.Handle("Wait", "", rpcjson.Read, func(ctx context.Context, _ *rpcjson.Request) (any, error) {
		close(started)
		select {
		case <-gate:
			return "done", nil
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}))
	w := newWay(t, addr, nil, nil)
	d.serve(w.url(), mqtt.ServeOptions{})
	online(t, dialMQTT(t, "mqtt://"+addr+"/"+deviceID, nil, nil))
	s.publish(deviceID+"/rpc", `{"id":1,"src":"a","method":"Wait"}`, false)
	<-started
	release := w.block()
	close(gate)
	release()
	require.Equal(t, `{"id":1,"src":"esp32_123456","dst":"a","result":"done"}`, s.await("a/rpc", 1)[0])
	s.settled()
	require.Len(t, s.on("a/rpc"), 1)
}

// Calls that came while the device was away are served if it was for a short
// time, and not if it was long, or its program has been restarted since.
func TestMQTTSession(t *testing.T) {
	brokers(t, func(t *testing.T, addr string) {
		for _, c := range []struct {
			name      string
			resumeFor time.Duration
			restart   bool
			counts    int
		}{
			{"short", 0, false, 1},
			{"long", time.Nanosecond, false, 0},
			{"never", -1, false, 0},
			{"restart", 0, true, 0},
		} {
			t.Run(c.name, func(t *testing.T) {
				d := newDevice(t, nil)
				count := d.counter("Count")
				client := dialMQTT(t, "mqtt://"+addr+"/"+deviceID, nil, nil)
				w := newWay(t, addr, nil, nil)
				o := mqtt.ServeOptions{ResumeFor: c.resumeFor}
				stop := d.serve(w.url(), o)
				online(t, client)
				if c.restart {
					stop()
				}
				release := w.block()
				defer release()
				publisher(t, addr)(deviceID+"/rpc", `{"id":1,"src":"a","method":"Count"}`, false)
				release()
				if c.restart {
					stop = d.serve(w.url(), o)
				}
				online(t, client)
				require.Eventually(t, func() bool { return count() >= c.counts }, deadline, poll)
				online(t, client)
				require.Equal(t, c.counts, count())
				stop()
			})
		}
	})
}

// Somebody else of the same client id, and then the broker's word that the device
// is gone.
func TestMQTTStatus(t *testing.T) {
	s, addr := newSpy(t)
	d := newDevice(t, nil)
	w := newWay(t, addr, nil, nil)
	topic := deviceID + "/status"
	stop := d.serve(w.url(), mqtt.ServeOptions{StatusTopic: topic})
	require.Equal(t, []string{"online"}, s.await(topic, 1))
	w.cut()
	require.Equal(t, []string{"online", "offline", "online"}, s.await(topic, 3), "the will")
	stop()
	require.Equal(t, []string{"online", "offline", "online", "offline"}, s.await(topic, 4))
}

// With credentials, and an access list that keeps devices and clients apart.
func TestMQTTCredentials(t *testing.T) {
	passwd := needTool(t, "mosquitto_passwd", "mosquitto")
	dir := t.TempDir()
	file := dir + "/pw"
	for i, user := range []string{"dev", "admin", "reader"} {
		args := []string{"-b", file, user, "secret-" + user}
		if i == 0 {
			args = append([]string{"-c"}, args...)
		}
		out, err := exec.Command(passwd, args...).CombinedOutput()
		require.NoError(t, err, "%s", out)
	}
	m := startMosquitto(t, "allow_anonymous false\npassword_file "+file+"\nacl_file DIR/acl\n", map[string]string{
		"acl": "user dev\ntopic read " + deviceID + "/rpc\ntopic write +/rpc-resp/+/rpc\ntopic write " + deviceID + "/rpc-resp/+/rpc\n" +
			"user admin\ntopic write " + deviceID + "/rpc\ntopic read " + deviceID + "/rpc-resp/+/rpc\n" +
			"user reader\ntopic read " + deviceID + "/rpc-resp/+/rpc\n",
	})
	d := newDevice(t, nil)
	d.serve("mqtt://dev:secret-dev@"+m.addr, mqtt.ServeOptions{})
	url := "mqtt://admin:secret-admin@" + m.addr + "/" + deviceID
	c := dialMQTT(t, url, nil, nil)
	online(t, c)
	online(t, dialMQTT(t, "mqtt://"+m.addr+"/"+deviceID, &mqtt.DialOptions{Username: "admin", Password: "secret-admin"}, nil))
	for _, bad := range []string{"mqtt://" + m.addr, "mqtt://admin:wrong@" + m.addr, "mqtt://x:y@" + m.addr} {
		begun := time.Now()
		var e *rpcjson.Error
		err := dialMQTT(t, bad+"/"+deviceID, nil, nil).Call(t.Context(), "RPC.Ping", nil, nil)
		require.ErrorAs(t, err, &e, bad)
		require.Equal(t, 401, e.Code)
		require.NotContains(t, err.Error(), "wrong")
		require.Less(t, time.Since(begun), deadline)
	}
	// May connect, but its calls go nowhere.
	err := dialMQTT(t, "mqtt://reader:secret-reader@"+m.addr+"/"+deviceID, nil, &rpcjson.ClientOptions{Timeout: time.Second}).
		Call(t.Context(), "RPC.Ping", nil, nil)
	require.ErrorIs(t, err, rpcjson.ErrNoReply)
	everyMethod(t, genuine(t, url, deadline), d)

	// A device with a wrong password keeps trying.
	var log syncBuffer
	other := newDevice(t, func(o *rpcjson.Options) { o.ID = "other" })
	stop := other.serve("mqtt://dev:wrong@"+m.addr, mqtt.ServeOptions{Logger: slog.New(slog.NewTextHandler(&log, nil))})
	require.Eventually(t, func() bool { return strings.Count(log.String(), "connection lost") > 2 }, deadline, poll)
	stop()
	require.NotContains(t, log.String(), "wrong")
}

// syncBuffer is a log to be read while it is written.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(b)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

func TestMQTTTLS(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	require.NoError(t, err)
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	require.NoError(t, err)
	certPEM := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	m := startMosquitto(t, "certfile DIR/cert\nkeyfile DIR/key\nallow_anonymous true\n", map[string]string{
		"cert": string(certPEM),
		"key":  string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})),
	})
	pool := x509.NewCertPool()
	require.True(t, pool.AppendCertsFromPEM(certPEM))
	o := mqtt.DialOptions{TLS: &tls.Config{RootCAs: pool}}
	d := newDevice(t, nil)
	d.serve("mqtts://"+m.addr, mqtt.ServeOptions{Dial: o})
	c := dialMQTT(t, "mqtts://"+m.addr+"/"+deviceID, &o, nil)
	online(t, c)
	require.ErrorContains(t, dialMQTT(t, "mqtts://"+m.addr+"/"+deviceID, nil, nil).Call(t.Context(), "RPC.Ping", nil, nil), "certificate")
	zip := readSmall(t)
	require.NoError(t, c.Push(t.Context(), bytes.NewReader(zip), int64(len(zip)), nil))
	d.installed()
}

// A broker that cannot be reached, is full, or refuses the subscription.
func TestMQTTDialErrors(t *testing.T) {
	c := dialMQTT(t, "mqtt://"+freePort(t)+"/"+deviceID, nil, nil)
	err := c.Call(t.Context(), "RPC.Ping", nil, nil)
	require.ErrorIs(t, err, rpcjson.ErrNoReply)
	var oe *net.OpError
	require.ErrorAs(t, err, &oe)
	require.Equal(t, "dial", oe.Op)

	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	ctx, cancel := context.WithCancelCause(t.Context())
	stopped := errors.New("stopped")
	go func() {
		conn, err := l.Accept() // never answers
		if err == nil {
			defer conn.Close()
		}
		cancel(stopped)
		<-t.Context().Done()
	}()
	err = dialMQTT(t, "mqtt://"+l.Addr().String()+"/"+deviceID, nil, nil).Call(ctx, "RPC.Ping", nil, nil)
	require.ErrorIs(t, err, rpcjson.ErrNoReply)
	require.ErrorIs(t, err, stopped)
}

// 200 clients ask while an update is running, and then everything ends.
func TestMQTTManyConnections(t *testing.T) {
	const conns, rounds = 200, 5
	_, addr := startMochi(t)
	goroutines := runtime.NumGoroutine()
	d := newDevice(t, nil)
	stop := d.serve("mqtt://"+addr, mqtt.ServeOptions{Logger: slog.New(slog.DiscardHandler)})
	zip := readSmall(t)
	clients := make([]*rpcjson.Client, conns)
	for i := range clients {
		ch, err := mqtt.Dial(t.Context(), "mqtt://"+addr+"/"+deviceID, nil)
		require.NoError(t, err)
		clients[i] = rpcjson.NewClient(ch, nil)
	}
	online(t, clients[0])
	require.NoError(t, clients[0].Call(t.Context(), "OTA.Begin", map[string]any{"size": len(zip)}, nil))
	require.NoError(t, clients[0].Call(t.Context(), "OTA.Write", map[string]any{"offset": 0, "data": zip[:1000]}, nil))
	var mu sync.Mutex
	var took []time.Duration
	var overflow atomic.Int64
	var wg sync.WaitGroup
	for _, c := range clients { // all at once
		wg.Go(func() {
			_, err := c.BootState(t.Context())
			var e *rpcjson.Error
			switch {
			case errors.As(err, &e) && e.Code == 429:
				overflow.Add(1)
			case err != nil:
				t.Errorf("%v", err)
			}
		})
	}
	wg.Wait()
	next := make(chan *rpcjson.Client)
	for range 16 {
		wg.Go(func() {
			for c := range next {
				begun := time.Now()
				if _, err := c.BootState(t.Context()); err != nil {
					t.Errorf("%v", err)
				}
				mu.Lock()
				took = append(took, time.Since(begun))
				mu.Unlock()
			}
		})
	}
	for range rounds {
		for _, c := range clients {
			next <- c
		}
	}
	close(next)
	wg.Wait()
	st, err := clients[0].Status(t.Context())
	require.NoError(t, err)
	require.Equal(t, rpcjson.StateProgress, st.State)
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	slices.Sort(took)
	median := took[len(took)/2]
	t.Logf("%d clients: median %v, max %v, %d of a burst answered 429, heap with broker and clients %d KiB",
		conns, median, took[len(took)-1], overflow.Load(), m.HeapAlloc>>10)
	require.Less(t, median, 100*time.Millisecond)
	for _, c := range clients {
		wg.Go(func() { _ = c.Close() })
	}
	wg.Wait()
	stop()
	require.NoError(t, d.srv.Close())
	settled(t, goroutines)
}
