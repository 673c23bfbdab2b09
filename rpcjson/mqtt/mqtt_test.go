package mqtt

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	paho "github.com/eclipse/paho.mqtt.golang"
	"github.com/eclipse/paho.mqtt.golang/packets"
	"github.com/stretchr/testify/require"

	"github.com/slotota/ota"
	"github.com/slotota/ota/rpcjson"
)

// The tests against brokers are in the module interop.

func TestURLs(t *testing.T) {
	for raw, want := range map[string]broker{
		"mqtt://h":            {addr: "h:1883"},
		"mqtts://h":           {addr: "h:8883"},
		"mqtt://u:p@h:1/x":    {addr: "h:1", username: "u", password: "p"},
		"mqtt://u@[::1]:1/":   {addr: "[::1]:1", username: "u"},
		"mqtt://%40:%3A@h/%2": {},
	} {
		b, path, err := newBroker(raw, &DialOptions{})
		if want.addr == "" {
			require.ErrorIs(t, err, ota.ErrInvalid, raw)
			continue
		}
		require.NoError(t, err)
		require.Equal(t, want.addr, b.addr)
		require.Equal(t, want.username, b.username)
		require.Equal(t, want.password, b.password)
		require.Equal(t, strings.HasPrefix(raw, "mqtts"), b.tls != nil)
		require.Equal(t, raw == "mqtt://u:p@h:1/x", path == "x")
	}
	b, _, err := newBroker("mqtt://u:p@h", &DialOptions{Username: "v", Password: "q"})
	require.NoError(t, err)
	require.Equal(t, "v q", b.username+" "+b.password)

	srv := newServer(t, "esp32_123456")
	for _, u := range []string{"", "h", "http://h/x", "mqtt://", "mqtt:///x", "mqtt://secret:secret@h:x/", "ws://h/x"} {
		_, err := Dial(t.Context(), u, nil)
		require.ErrorIs(t, err, ota.ErrInvalid, "%q", u)
		require.NotContains(t, err.Error(), "secret")
		require.ErrorIs(t, Serve(t.Context(), srv, u, nil), ota.ErrInvalid, "%q", u)
	}
	for _, id := range []string{"", "+", "a+", "a/#", "a?b", "a/%23", "$SYS", "a%00", "a%0a", strings.Repeat("x", 600)} {
		_, err := Dial(t.Context(), "mqtt://h/"+id, nil)
		require.ErrorIs(t, err, ota.ErrInvalid, "%q", id)
	}
	_, err = Dial(t.Context(), "mqtt://h/x", &DialOptions{ClientID: "a+b"})
	require.ErrorIs(t, err, ota.ErrInvalid)
	_, err = Dial(t.Context(), "mqtt://h/x", &DialOptions{Password: strings.Repeat("x", 65536)})
	require.ErrorIs(t, err, ota.ErrInvalid)
	require.ErrorContains(t, Serve(t.Context(), srv, "mqtt://h/other", nil), "path")
	require.ErrorIs(t, Serve(t.Context(), newServer(t, "a#b"), "mqtt://h", nil), ota.ErrInvalid)
	for _, o := range []ServeOptions{{StatusTopic: "a/#"}, {MinDelay: time.Hour, MaxDelay: time.Second}, {Dial: DialOptions{Username: strings.Repeat("x", 65536)}}} {
		require.ErrorIs(t, Serve(t.Context(), srv, "mqtt://h", &o), ota.ErrInvalid)
	}

	ch, err := Dial(t.Context(), "mqtt://h/dev", &DialOptions{ClientID: "c"})
	require.NoError(t, err)
	src, dst := ch.Addresses()
	require.Equal(t, "dev/rpc-resp/c dev", src+" "+dst)
	require.NoError(t, ch.Close())
}

func newServer(t testing.TB, id string) *rpcjson.Server {
	t.Helper()
	srv, err := rpcjson.New(new(ota.Device), rpcjson.Options{ID: id, NoAuth: true})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, srv.Close()) })
	return srv
}

func TestWithMethod(t *testing.T) {
	for frame, want := range map[string]rpcjson.Header{
		``:                                 {Method: "A.b"},
		" \r\n":                            {Method: "A.b"},
		`{}`:                               {Method: "A.b"},
		` {"id":1,"src":"x"}`:              {Method: "A.b", ID: "1", Src: "x"},
		`{"id":1,"method":"Other"}`:        {Method: "Other", ID: "1"},
		`{"id":1,"method":""}`:             {ID: "1"},
		`{"id":1,"params":{"method":"x"}}`: {Method: "A.b", ID: "1"},
	} {
		b, err := withMethod([]byte(frame), "A.b")
		require.NoError(t, err)
		h, err := rpcjson.ParseHeader(b)
		require.NoError(t, err, "%s", b)
		require.Equal(t, want, h, "%s", b)
	}
	for _, m := range []string{`a"b`, `a\b`, "a b", "a/b", "ä", "a\x00", strings.Repeat("x", 129)} {
		_, err := withMethod([]byte("{}"), m)
		require.Error(t, err, "%q", m)
	}
	for _, f := range []string{"x", "[]", `"{}"`, "\xff"} {
		_, err := withMethod([]byte(f), "A")
		require.ErrorIs(t, err, rpcjson.ErrInvalidFrame)
	}
}

func TestWindow(t *testing.T) {
	const size = 100
	w := newWindow(size)
	now := time.Unix(1e9, 0)
	k := func(i int) key { return keyOf("t", fmt.Append(nil, i)) }
	require.NotEqual(t, keyOf("ab", []byte("c")), keyOf("a", []byte("bc")))
	require.False(t, w.copied(k(0), now, marked))
	require.True(t, w.copied(k(0), now.Add(marked-1), marked))
	require.False(t, w.copied(k(0), now.Add(unmarked), unmarked), "another one")
	require.True(t, w.copied(k(0), now.Add(unmarked+1), unmarked))
	require.False(t, w.copied(k(0), now.Add(unmarked+1), 0))
	now = now.Add(time.Hour)
	for i := range 50 * size {
		require.False(t, w.copied(k(i), now, marked))
		require.LessOrEqual(t, len(w.seen), size)
		require.LessOrEqual(t, len(w.ring), size)
		// The last ones are known, and the oldest forgotten.
		require.True(t, w.copied(k(max(0, i-size+1)), now, marked))
	}
	// One that comes again all the time does not push itself out.
	for i := range 10 * size {
		now = now.Add(marked)
		require.False(t, w.copied(k(0), now, marked), "%d", i)
		require.True(t, w.copied(k(0), now, marked))
	}
}

// message is a paho.Message of a size.
type message struct {
	paho.Message
	size int
}

func (m message) Payload() []byte { return make([]byte, m.size) }

func TestQueue(t *testing.T) {
	const frame = 1000
	q := newQueue(frame)
	for range queueBulk {
		require.True(t, q.put(message{size: frame}))
	}
	require.False(t, q.put(message{size: 1}), "too long together")
	require.True(t, q.put(message{}))
	q.taken(<-q.c)
	require.True(t, q.put(message{size: frame}))
	require.False(t, q.put(message{size: 1}))
	q = newQueue(frame)
	for range queueSize {
		require.True(t, q.put(message{size: 1}))
	}
	require.False(t, q.put(message{size: 1}), "too many")
	require.EqualValues(t, queueBulk*frame-queueSize, q.room.Load())
}

// TestLimitedConn sends packets of all types and sizes, in pieces of any size.
func TestLimitedConn(t *testing.T) {
	const limit = 1000
	topic := "\x00\x01t"
	for _, c := range []struct {
		name string
		send string
		want int // bytes of the first packet's body, -1 if refused
	}{
		{"connack", "\x20\x02\x00\x00", 2},
		{"suback", "\x90\x03\x00\x01\x01", 3},
		{"suback of two filters", "\x90\x04\x00\x01\x01\x01", -1},
		{"suback of none", "\x90\x02\x00\x01", -1},
		{"large pong", "\xd0\xff\x7f" + strings.Repeat("x", 16383), -1},
		{"huge connack", "\x20\xff\xff\xff\x7f", -1},
		{"endless length", "\x30\xff\xff\xff\xff\x01", -1},
		{"publish", "\x30\x05" + topic + "hi", 5},
		{"publish of the longest", string(wire(0x30, topic+strings.Repeat("x", 65535+limit))), 65538 + limit},
		{"publish too long", string(wire(0x30, topic+strings.Repeat("x", 300_000))), 65540 + limit},
	} {
		t.Run(c.name, func(t *testing.T) {
			a, b := net.Pipe()
			defer a.Close()
			const next = "\x40\x02\x00\x07"
			go func() {
				defer b.Close()
				_, _ = io.WriteString(b, c.send+next)
			}()
			lc := newLimitedConn(a, func() int { return limit })
			p, err := packets.ReadPacket(lc)
			if c.want < 0 {
				require.Error(t, err)
				return
			}
			require.NoError(t, err)
			if pub, ok := p.(*packets.PublishPacket); ok {
				require.Equal(t, c.want, pub.RemainingLength)
				require.Equal(t, "t", pub.TopicName)
				require.Len(t, pub.Payload, c.want-3)
			}
			p, err = packets.ReadPacket(lc)
			require.NoError(t, err)
			require.EqualValues(t, 7, p.(*packets.PubackPacket).MessageID)
			_, err = packets.ReadPacket(lc)
			require.ErrorIs(t, err, io.EOF)
		})
	}
}

// Packets written at once stay whole, however long.
func TestLimitedConnWrite(t *testing.T) {
	a, b := net.Pipe()
	defer b.Close()
	c := newLimitedConn(a, nil)
	long := wire(0x30, "\x00\x01t"+strings.Repeat("x", 100_000))
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 20 {
				if _, err := c.Write(long); err != nil {
					t.Error(err)
				}
				if _, err := io.WriteString(c, "\xc0\x00"); err != nil {
					t.Error(err)
				}
			}
		})
	}
	r := bufio.NewReader(b)
	for range 160 {
		p, err := packets.ReadPacket(r)
		require.NoError(t, err)
		if pub, ok := p.(*packets.PublishPacket); ok {
			require.Equal(t, strings.Repeat("x", 100_000), string(pub.Payload))
		} else {
			require.IsType(t, &packets.PingreqPacket{}, p)
		}
	}
	wg.Wait()
}

// wire returns a packet as on the wire.
func wire(head byte, body string) []byte {
	b := []byte{head}
	for n := len(body); ; {
		c := byte(n & 0x7f)
		if n >>= 7; n > 0 {
			b = append(b, c|0x80)
			continue
		}
		return append(append(b, c), body...)
	}
}

// A bound on what comes through, whatever a broker sends.
func FuzzLimitedConn(f *testing.F) {
	f.Add([]byte("\x20\x02\x00\x00\x90\x03\x00\x01\x01"), uint8(3))
	f.Add(wire(0x32, "\x00\x01t\x00\x01hello"), uint8(1))
	f.Add([]byte("\x30\xff\xff\xff\x7f"), uint8(200))
	f.Fuzz(func(t *testing.T, data []byte, step uint8) {
		c := &limitedConn{r: bufio.NewReaderSize(bytes.NewReader(data), 16), max: func() int { return 10 }}
		buf := make([]byte, int(step)+1)
		var got bytes.Buffer
		for {
			n, err := c.Read(buf)
			got.Write(buf[:n])
			if err != nil {
				break
			}
		}
		require.LessOrEqual(t, got.Len(), len(data))
		for {
			p, err := packets.ReadPacket(&got)
			if err != nil {
				return
			}
			if s, ok := p.(*packets.SubackPacket); ok {
				require.Len(t, s.ReturnCodes, 1)
			}
		}
	})
}

// script is a broker that says what it is told to, whatever it hears.
func script(t *testing.T, say func(n int, c net.Conn, r *bufio.Reader)) func(ctx context.Context, network, addr string) (net.Conn, error) {
	n := 0
	return func(context.Context, string, string) (net.Conn, error) {
		a, b := net.Pipe()
		i := n
		n++
		go func() {
			defer b.Close()
			r := bufio.NewReader(b)
			if _, err := packets.ReadPacket(r); err != nil { // CONNECT
				return
			}
			say(i, b, r)
			_, _ = io.Copy(io.Discard, r)
		}()
		return a, nil
	}
}

// Whatever a broker sends, the device tries again, ever more slowly, and ends
// when it is told to, with all that the library started.
func TestHostileBroker(t *testing.T) {
	rnd := rand.NewChaCha8([32]byte{2})
	garbage := make([]byte, 3000)
	for name, say := range map[string]func(n int, c net.Conn, r *bufio.Reader){
		"silence": func(int, net.Conn, *bufio.Reader) {},
		"end":     func(_ int, c net.Conn, _ *bufio.Reader) { c.Close() },
		"garbage": func(_ int, c net.Conn, _ *bufio.Reader) {
			_, _ = rnd.Read(garbage)
			_, _ = c.Write(garbage)
		},
		"garbage after connecting": func(_ int, c net.Conn, _ *bufio.Reader) {
			_, _ = rnd.Read(garbage)
			_, _ = c.Write(append([]byte("\x20\x02\x00\x00"), garbage...))
		},
		"refusal": func(n int, c net.Conn, _ *bufio.Reader) {
			_, _ = c.Write([]byte{0x20, 2, 0, byte(n % 7)})
		},
		"no subscription": func(_ int, c net.Conn, r *bufio.Reader) {
			_, _ = io.WriteString(c, "\x20\x02\x00\x00")
			for {
				p, err := packets.ReadPacket(r)
				if err != nil {
					return
				}
				if s, ok := p.(*packets.SubscribePacket); ok {
					_, _ = c.Write([]byte{0x90, 3, byte(s.MessageID >> 8), byte(s.MessageID), 0x80})
				}
			}
		},
		"too many answers": func(_ int, c net.Conn, _ *bufio.Reader) {
			_, _ = io.WriteString(c, "\x20\x02\x00\x00\x90\x06\x00\x01\x01\x01\x01\x01")
		},
		"acknowledgements of nothing": func(_ int, c net.Conn, _ *bufio.Reader) {
			_, _ = io.WriteString(c, "\x20\x02\x00\x00\x40\x02\x00\x09\x50\x02\x00\x09\x62\x02\x00\x09\x70\x02\x00\x09\xb0\x02\x00\x09\xd0\x00\x90\x03\x00\x09\x01")
		},
		"other messages": func(_ int, c net.Conn, _ *bufio.Reader) {
			_, _ = io.WriteString(c, "\x20\x02\x00\x00\x90\x03\x00\x01\x01"+strings.Repeat("\x30\x05\x00\x01xhi\x32\x07\x00\x01x\x00\x01hi\x34\x07\x00\x01x\x00\x02hi", 1000))
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				tries := 0
				dial := script(t, say)
				ctx, cancel := context.WithCancelCause(t.Context())
				stopped := errors.New("stopped")
				done := make(chan error, 1)
				go func() {
					done <- Serve(ctx, newServer(t, "dev"), "mqtt://broker", &ServeOptions{Dial: DialOptions{
						DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
							tries++
							require.Equal(t, "broker:1883", addr)
							return dial(ctx, network, addr)
						},
					}})
				}()
				time.Sleep(10 * time.Minute)
				synctest.Wait()
				require.LessOrEqual(t, tries, 30)
				require.GreaterOrEqual(t, tries, 5)
				begun := time.Now()
				cancel(stopped)
				require.ErrorIs(t, <-done, stopped)
				require.Less(t, time.Since(begun), 10*time.Second)
			})
		})
	}
}

// Closing the server of the calls ends Serve when the next call comes.
func TestServeClosed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		srv := newServer(t, "dev")
		dial := script(t, func(_ int, c net.Conn, r *bufio.Reader) {
			_, _ = io.WriteString(c, "\x20\x02\x00\x00")
			for {
				p, err := packets.ReadPacket(r)
				if err != nil {
					return
				}
				if s, ok := p.(*packets.SubscribePacket); ok {
					_, _ = c.Write([]byte{0x90, 3, byte(s.MessageID >> 8), byte(s.MessageID), 1})
					_ = srv.Close()
					_, _ = c.Write(wire(0x30, "\x00\x07dev/rpc"+`{"id":1,"src":"a","method":"RPC.Ping"}`))
				}
			}
		})
		require.ErrorIs(t, Serve(t.Context(), srv, "mqtt://broker", &ServeOptions{Dial: DialOptions{DialContext: dial}, Logger: slog.New(slog.DiscardHandler)}), rpcjson.ErrClosed)
	})
}

// A broker that is not reached, or refuses, ends a call at once or in time.
func TestDialRefused(t *testing.T) {
	for code, want := range map[byte]int{1: 400, 2: 400, 3: 503, 4: 401, 5: 401} {
		synctest.Test(t, func(t *testing.T) {
			dial := script(t, func(_ int, c net.Conn, _ *bufio.Reader) { _, _ = c.Write([]byte{0x20, 2, 0, code}) })
			ch, err := Dial(t.Context(), "mqtt://broker/dev", &DialOptions{DialContext: dial})
			require.NoError(t, err)
			c := rpcjson.NewClient(ch, nil)
			var e *rpcjson.Error
			require.ErrorAs(t, c.Call(t.Context(), "RPC.Ping", nil, nil), &e)
			require.Equal(t, want, e.Code)
			require.NoError(t, c.Close())
			require.ErrorContains(t, c.Call(t.Context(), "RPC.Ping", nil, nil), "closed")
		})
	}
}
