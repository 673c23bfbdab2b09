package rpcjson

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota"
)

// ether is a network for datagrams within a bubble.
type ether struct {
	mu    sync.Mutex
	conns map[string]*etherConn
	count int
	// fault says of the i-th datagram after how long it and its copies arrive.
	fault func(i int, from, to string, b []byte) []time.Duration
}

type etherAddr string

func (a etherAddr) Network() string { return "udp" }
func (a etherAddr) String() string  { return string(a) }

// etherConn is a socket; one that is connected has a peer.
type etherConn struct {
	e          *ether
	addr, peer string
	in         chan datagram
	done       chan struct{}
	once       sync.Once
}

type datagram struct {
	from string
	b    []byte
}

func newEther() *ether { return &ether{conns: map[string]*etherConn{}} }

func (e *ether) open(addr, peer string) *etherConn {
	c := &etherConn{e: e, addr: addr, peer: peer, in: make(chan datagram, 100), done: make(chan struct{})}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.conns[addr] = c
	return c
}

func (c *etherConn) ReadFrom(b []byte) (int, net.Addr, error) {
	select {
	case d := <-c.in:
		return copy(b, d.b), etherAddr(d.from), nil
	case <-c.done:
		return 0, nil, net.ErrClosed
	}
}

func (c *etherConn) WriteTo(b []byte, addr net.Addr) (int, error) {
	c.e.mu.Lock()
	to := c.e.conns[addr.String()]
	i := c.e.count
	c.e.count++
	fault := c.e.fault
	c.e.mu.Unlock()
	after := []time.Duration{0}
	if fault != nil {
		after = fault(i, c.addr, addr.String(), b)
	}
	d := datagram{c.addr, bytes.Clone(b)}
	for _, t := range after {
		deliver := func() {
			select {
			case to.in <- d:
			default:
			}
		}
		if to == nil {
			continue
		}
		if t == 0 {
			deliver()
		} else {
			time.AfterFunc(t, deliver)
		}
	}
	return len(b), nil
}

func (c *etherConn) Read(b []byte) (int, error) {
	n, _, err := c.ReadFrom(b)
	return n, err
}
func (c *etherConn) Write(b []byte) (int, error)      { return c.WriteTo(b, etherAddr(c.peer)) }
func (c *etherConn) Close() error                     { c.once.Do(func() { close(c.done) }); return nil }
func (c *etherConn) LocalAddr() net.Addr              { return etherAddr(c.addr) }
func (c *etherConn) RemoteAddr() net.Addr             { return etherAddr(c.peer) }
func (c *etherConn) SetDeadline(time.Time) error      { return nil }
func (c *etherConn) SetReadDeadline(time.Time) error  { return nil }
func (c *etherConn) SetWriteDeadline(time.Time) error { return nil }

const deviceAddr = "10.0.0.1:12345"

// ask sends a datagram from c and returns what comes back, once nothing happens
// any more.
func (c *etherConn) ask(t *testing.T, text string) (replies []string) {
	t.Helper()
	_, err := c.Write([]byte(text))
	require.NoError(t, err)
	synctest.Wait()
	for {
		select {
		case d := <-c.in:
			replies = append(replies, string(d.b))
		default:
			return replies
		}
	}
}

// serveEther serves s at deviceAddr.
func serveEther(t *testing.T, s *Server, o *PacketOptions) (*ether, *packetServer) {
	e := newEther()
	p := s.newPacketServer(e.open(deviceAddr, ""), o)
	ended := make(chan error, 1)
	ctx, cancel := context.WithCancel(context.Background())
	go func() { ended <- p.run(ctx) }()
	t.Cleanup(func() {
		cancel()
		require.ErrorIs(t, <-ended, context.Canceled)
	})
	return e, p
}

// The recorded datagrams of mos are answered with what it expects, also after one
// whose reply gets lost.
func TestUDPVectors(t *testing.T) {
	var v struct {
		Cases []struct {
			Name      string
			Datagrams []struct{ Dir, Data, RPC string }
			Dropped   int64 `json:"dropped_reply_to"`
		}
	}
	readVectors(t, "udp.json", &v)
	require.Len(t, v.Cases, 3)
	for _, c := range v.Cases {
		t.Run(c.Name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				d := newFake()
				e, _ := serveEther(t, newTest(t, d, nil), nil)
				conn := e.open("10.0.0.2:5000", deviceAddr)
				var got, want []string
				for _, x := range c.Datagrams {
					if x.Dir == "client_to_device" {
						got = append(got, conn.ask(t, x.Data)...)
						continue
					}
					// Values of the reply to OTA.End are placeholders.
					want = append(want, strings.Replace(x.Data, `rebooting", "is_committed": true, "progress_percent": 0`, `rebooting", "is_committed": true, "progress_percent": 100`, 1))
				}
				lost := fmt.Sprintf(`{"id":%d,"src":"esp32_123456","dst":"mos","result":null}`, c.Dropped)
				if c.Dropped != 0 {
					require.Contains(t, got, lost)
					got = slices.DeleteFunc(got, func(s string) bool { return s == lost })
				}
				require.Equal(t, want, got)
				if strings.HasPrefix(c.Name, "ota/") {
					require.Len(t, d.got, 2558)
				}
			})
		})
	}
}

// What changes something is executed once, however often its datagram comes.
func TestUDPDuplicates(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTest(t, newFake(), nil)
		n := 0
		release := make(chan struct{}, 1)
		require.NoError(t, s.Handle("Toggle", "", Operate, func(context.Context, *Request) (any, error) {
			n++
			<-release
			return n, nil
		}))
		e, _ := serveEther(t, s, nil)
		a, b := e.open("10.0.0.2:5000", deviceAddr), e.open("10.0.0.2:5001", deviceAddr)
		const call = `{"id":1,"method":"Toggle"}`
		reply := func(n int) []string { return []string{fmt.Sprintf(`{"id":1,"src":"esp32_123456","result":%d}`, n)} }

		require.Empty(t, a.ask(t, call))
		require.Empty(t, a.ask(t, call), "is under way")
		release <- struct{}{}
		synctest.Wait()
		require.Equal(t, reply(1), a.ask(t, call)[:1])
		require.Equal(t, reply(1), a.ask(t, call))
		time.Sleep(time.Minute - time.Millisecond)
		require.Equal(t, reply(1), a.ask(t, call))
		release <- struct{}{}
		require.Equal(t, reply(2), b.ask(t, call), "from elsewhere")
		release <- struct{}{}
		require.Equal(t, []string{`{"id":2,"src":"esp32_123456","result":3}`}, a.ask(t, `{"id":2,"method":"Toggle"}`))
		time.Sleep(time.Minute)
		release <- struct{}{}
		require.Equal(t, reply(4), a.ask(t, call), "much later")

		// Without id there is no telling.
		for range 2 {
			release <- struct{}{}
			require.Empty(t, a.ask(t, `{"method":"Toggle"}`))
		}
		require.Equal(t, 6, n)
	})
}

// A datagram that was not executed is no duplicate of one that may be.
func TestUDPRefused(t *testing.T) {
	const call = `{"id":1,"method":"Toggle"}`
	const done = `{"id":1,"src":"esp32_123456","result":null}`
	serve := func(t *testing.T, o *PacketOptions, change func(*Options)) (*etherConn, *Server, *packetServer) {
		s := newTest(t, newFake(), change)
		require.NoError(t, s.Handle("Toggle", "", Operate, func(context.Context, *Request) (any, error) { return nil, nil }))
		e, p := serveEther(t, s, o)
		return e.open("10.0.0.2:5000", deviceAddr), s, p
	}
	t.Run("peer", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			refuse := true
			c, _, p := serve(t, &PacketOptions{Peer: func(net.Addr) (Peer, error) {
				if refuse {
					return Peer{}, errors.New("not you")
				}
				return Peer{}, nil
			}}, nil)
			require.Empty(t, c.ask(t, call))
			require.Empty(t, p.sources, "who is refused takes no place")
			refuse = false
			require.Equal(t, []string{done}, c.ask(t, call))
			refuse = true
			require.Empty(t, c.ask(t, call), "not any more")
		})
	})
	t.Run("overflow", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			c, s, _ := serve(t, nil, func(o *Options) { o.MaxPending = 1 })
			require.True(t, s.acquire())
			require.Empty(t, c.ask(t, call))
			time.Sleep(time.Second)
			require.Equal(t, []string{`{"id":1,"src":"esp32_123456","error":{"code":429,"message":"Request queue overflow"}}`}, c.ask(t, ""))
			s.release()
			require.Equal(t, []string{done}, c.ask(t, call))
		})
	})
}

// A push session belongs to the address that has begun it.
func TestUDPPinned(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newFake()
		s := newTest(t, d, nil)
		e, _ := serveEther(t, s, nil)
		a, port, host := e.open("10.0.0.2:5000", deviceAddr), e.open("10.0.0.2:6000", deviceAddr), e.open("10.0.0.3:5000", deviceAddr)
		id := 0
		call := func(c *etherConn, method, params string) string {
			id++
			r := c.ask(t, fmt.Sprintf(`{"id":%d,"method":"OTA.%s","params":%s}`, id, method, params))
			require.Len(t, r, 1)
			return strings.TrimPrefix(r[0], fmt.Sprintf(`{"id":%d,"src":"esp32_123456",`, id))
		}
		const done, refused = `"result":null}`, `"error":{"code":503,"message":"the push session belongs to another client"}}`
		require.Equal(t, done, call(a, "Begin", "{}"))
		require.Equal(t, done, call(a, "Begin", "{}"), "once more, with another id")
		for _, c := range []*etherConn{port, host} {
			require.Equal(t, refused, call(c, "Begin", "{}"))
			require.Equal(t, refused, call(c, "Write", `{"offset":0,"data":"QUJD"}`))
			require.Equal(t, refused, call(c, "End", "{}"))
			require.Contains(t, call(c, "Status", "{}"), `"state": 1`)
		}
		require.Equal(t, done, call(a, "Write", `{"offset":0,"data":"QUJD"}`))
		time.Sleep(takeoverIdle)
		require.Equal(t, refused, call(host, "Write", `{"offset":3,"data":"REVG"}`))
		require.Equal(t, done, call(port, "Write", `{"offset":3,"data":"REVG"}`))
		require.Equal(t, refused, call(a, "End", "{}"))
		require.Contains(t, call(port, "End", "{}"), `"state": 3`)
		require.Contains(t, call(port, "End", "{}"), `"state": 3`)
		require.Equal(t, "ABCDEF", string(d.got))
	})
	synctest.Test(t, func(t *testing.T) { // begun elsewhere, where nobody is pinned
		s := newTest(t, newFake(), nil)
		e, _ := serveEther(t, s, nil)
		require.Equal(t, `"result":null`, do(t, s, "OTA.Begin", "{}"))
		require.Contains(t, e.open("10.0.0.2:5000", deviceAddr).ask(t, `{"id":1,"method":"OTA.Begin"}`)[0], `"code":503`)
		require.Equal(t, `"result":null`, do(t, s, "OTA.Write", `{"offset":0,"data":"QUJD"}`))
	})
}

// A reply too long for a datagram is an error that says so; other datagrams are
// ignored.
func TestUDPReplies(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTest(t, newFake(), nil)
		require.NoError(t, s.Handle("Long", "", Read, func(context.Context, *Request) (any, error) {
			return strings.Repeat("x", DefaultMaxDatagram), nil
		}))
		e, _ := serveEther(t, s, &PacketOptions{Peer: func(a net.Addr) (Peer, error) {
			if a.String() == "10.0.0.9:1" {
				return Peer{}, errors.New("not you")
			}
			return Peer{Channel: "UDP_in", Addr: a.String()}, nil
		}})
		c := e.open("10.0.0.2:5000", deviceAddr)
		require.Equal(t, []string{`{"id":1,"src":"esp32_123456","error":{"code":500,"message":"reply of 10041 bytes, at most 10000 in a datagram"}}`},
			c.ask(t, `{"id":1,"method":"Long"}`))
		require.Equal(t, []string{`{"id":1,"src":"esp32_123456","result":{"channel_info": "10.0.0.2:5000"}}`}, c.ask(t, `{"id":1,"method":"RPC.Ping"}`))
		for _, text := range []string{"", "{", "{}", `{"id":1,"result":2}`, `{"id":1,"dst":"x","method":"RPC.Ping"}`, string(noise()[:9000])} {
			require.Empty(t, c.ask(t, text))
		}
		require.Empty(t, e.open("10.0.0.9:1", deviceAddr).ask(t, `{"id":1,"method":"RPC.Ping"}`))
	})
}

// What is remembered of sources is bounded.
func TestUDPMemory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, p := serveEther(t, newTest(t, newFake(), nil), nil)
		for i := range 1000 {
			c := e.open(fmt.Sprintf("10.1.0.0:%d", i), deviceAddr)
			for n := range 10 {
				require.Len(t, c.ask(t, fmt.Sprintf(`{"id":%d,"method":"OTA.SetBootState","params":{"revert_slot":1}}`, n+1)), 1)
			}
		}
		require.Len(t, p.sources, DefaultMaxSources)
		for _, src := range p.sources {
			require.LessOrEqual(t, len(src.memos), maxMemos)
			require.Zero(t, src.calls)
		}
	})
}

// pushData is what tests push.
func pushData(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i * i >> 4)
	}
	return b
}

// Whichever datagram gets lost, is doubled or comes late, a push succeeds, and the
// device reads each byte once.
func TestUDPPush(t *testing.T) {
	data := pushData(3000)
	for name, after := range map[string][]time.Duration{
		"lost": {}, "doubled": {0, 0}, "doubled late": {0, 3 * time.Second}, "late": {1200 * time.Millisecond},
	} {
		t.Run(name, func(t *testing.T) {
			for k, hit := 0, true; hit; k++ {
				hit = false
				synctest.Test(t, func(t *testing.T) {
					d := newFake()
					e, _ := serveEther(t, newTest(t, d, nil), nil)
					e.fault = func(i int, _, _ string, _ []byte) []time.Duration {
						if i == k {
							hit = true
							return after
						}
						return []time.Duration{0}
					}
					c := NewClient(NewDatagram(func(context.Context) (net.Conn, error) { return e.open("10.0.0.2:5000", deviceAddr), nil }, nil), nil)
					defer c.Close()
					require.NoError(t, c.Push(t.Context(), bytes.NewReader(data), int64(len(data)), nil), "datagram %d", k)
					require.Equal(t, data, d.got)
					require.Equal(t, 1, len(slices.DeleteFunc(d.log(), func(s string) bool { return s != "update" })), "updates")
				})
			}
		})
	}
}

// breaking is a connection that breaks after so many bytes, in either direction.
type breaking struct {
	net.Conn
	left *int
	mu   *sync.Mutex
}

func (b breaking) spend(n int) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	n = min(n, *b.left)
	*b.left -= n
	return n
}

func (b breaking) Read(p []byte) (int, error) {
	n, err := b.Conn.Read(p)
	if k := b.spend(n); k < n {
		b.Close()
		return k, io.ErrUnexpectedEOF
	}
	return n, err
}

func (b breaking) Write(p []byte) (int, error) {
	n := b.spend(len(p))
	k, err := b.Conn.Write(p[:n])
	if err == nil && n < len(p) {
		b.Close()
		err = io.ErrClosedPipe
	}
	return k, err
}

// pipeDialer dials s within a bubble; the first connection breaks after left
// bytes.
func pipeDialer(t *testing.T, s *Server, o *StreamOptions, left int) func(context.Context) (io.ReadWriteCloser, error) {
	first := true
	return func(context.Context) (io.ReadWriteCloser, error) {
		mine, theirs := net.Pipe()
		go s.ServeStream(t.Context(), theirs, Peer{}, o)
		if first && left >= 0 {
			first = false
			return breaking{mine, &left, new(sync.Mutex)}, nil
		}
		return mine, nil
	}
}

// Wherever the connection breaks, a push goes on over the next one.
func TestStreamPushBreaks(t *testing.T) {
	data := pushData(3000)
	for name, o := range map[string]*StreamOptions{"plain": nil, "serial": SerialStream()} {
		t.Run(name, func(t *testing.T) {
			broken := 0
			for left := 700; left < 7500; left += 61 {
				synctest.Test(t, func(t *testing.T) {
					d := newFake()
					s := newTest(t, d, nil)
					dials := 0
					dial := pipeDialer(t, s, o, left)
					c := NewClient(NewStream(func(ctx context.Context) (io.ReadWriteCloser, error) { dials++; return dial(ctx) }, o), nil)
					defer c.Close()
					require.NoError(t, c.Push(t.Context(), bytes.NewReader(data), int64(len(data)), &PushOptions{ChunkSize: 512}), "after %d bytes", left)
					require.Equal(t, data, d.got)
					if dials > 1 {
						broken++
					}
				})
			}
			require.Greater(t, broken, 50)
		})
	}
}

// A push that lost its device for good is resumed by another client.
func TestStreamPushResume(t *testing.T) {
	data := pushData(5000)
	synctest.Test(t, func(t *testing.T) {
		d := newFake()
		s := newTest(t, d, nil)
		mine, theirs := net.Pipe()
		go s.ServeStream(t.Context(), theirs, Peer{}, nil)
		left := 4000
		c := NewClient(NewStreamOf(breaking{mine, &left, new(sync.Mutex)}, nil), nil)
		err := c.Push(t.Context(), bytes.NewReader(data), int64(len(data)), &PushOptions{ChunkSize: 512})
		require.ErrorIs(t, err, ErrNoReply)
		require.NoError(t, c.Close())

		c = NewClient(NewStream(pipeDialer(t, s, nil, -1), nil), nil)
		defer c.Close()
		require.ErrorIs(t, c.Push(t.Context(), bytes.NewReader(data), int64(len(data)), nil), ota.ErrBusy)
		first := int64(-1)
		require.NoError(t, c.Push(t.Context(), bytes.NewReader(data), int64(len(data)), &PushOptions{Resume: true, ChunkSize: 512, Progress: func(done, _ int64) {
			if first < 0 {
				first = done
			}
		}}))
		require.GreaterOrEqual(t, first, int64(1024))
		require.Equal(t, data, d.got)
	})
}

// The client finds the size that the device takes.
func TestStreamPushSmallFrames(t *testing.T) {
	data := pushData(20000)
	synctest.Test(t, func(t *testing.T) {
		d := newFake()
		s := newTest(t, d, func(o *Options) { o.MaxFrame = 1024 })
		c := NewClient(NewStream(pipeDialer(t, s, nil, -1), nil), nil)
		defer c.Close()
		start := time.Now()
		require.NoError(t, c.Push(t.Context(), bytes.NewReader(data), int64(len(data)), nil))
		require.Equal(t, data, d.got)
		require.Less(t, time.Since(start), time.Second, "no time-outs")
	})
}

// The client sends as mos does: a handshake, then pieces with pauses, and obeys
// flow control.
func TestStreamClientPacing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mine, theirs := net.Pipe()
		o := SerialStream()
		o.PieceSize, o.PieceDelay = 16, 5*time.Millisecond
		w := &wire{Conn: theirs, t: t}
		go w.collect()
		defer theirs.Close()
		c := NewClient(NewStreamOf(mine, o), nil)
		defer c.Close()
		result := make(chan error, 1)
		go func() { result <- c.Call(t.Context(), "OTA.GetBootState", nil, nil) }()
		synctest.Wait()
		require.Equal(t, handshake+"\n\n", w.took())
		time.Sleep(3*handshakeEvery + time.Millisecond)
		synctest.Wait()
		require.Equal(t, strings.Repeat(handshake+"\n\n", 3), w.took())
		start := time.Now()
		frame := w.send("\n" + handshake + "\n\n")
		require.Equal(t, `"""`+"\n"+`"""{"src":"ota"`, frame)
		require.Empty(t, w.send("\x13"))
		time.Sleep(time.Second)
		synctest.Wait()
		require.Empty(t, w.took())
		p := w.send("\x11")
		require.Len(t, p, 16)
		frame += p
		for !strings.HasSuffix(frame, `"""`+"\n") {
			time.Sleep(5 * time.Millisecond)
			synctest.Wait()
			p = w.took()
			require.LessOrEqual(t, len(p), 16)
			frame += p
		}
		require.GreaterOrEqual(t, time.Since(start), time.Second+15*time.Millisecond)
		id := frame[strings.Index(frame, `"id":`)+5:]
		id = id[:strings.IndexByte(id, ',')]
		w.send("log text {\"id\":" + id + ",\"error\":{\"code\":9}}\n")
		w.send("\n{\"id\":" + id + ",\"result\":1}\n")
		require.NoError(t, <-result)
	})
}

// A stream that was handed over is closed, also if it was never used.
func TestStreamUnused(t *testing.T) {
	mine, theirs := net.Pipe()
	defer theirs.Close()
	c := NewClient(NewStreamOf(mine, nil), nil)
	require.NoError(t, c.Close())
	_ = mine.SetDeadline(time.Unix(1, 0)) // so that it does not wait if it is open
	_, err := mine.Write([]byte("x"))
	require.ErrorIs(t, err, io.ErrClosedPipe)
	require.ErrorIs(t, c.Call(t.Context(), "RPC.Ping", nil, nil), errChannelClosed)
	require.NoError(t, c.Close(), "once more")
}

// IdleTimeout is for servers.
func TestStreamClientIdle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTest(t, newFake(), nil)
		mine, theirs := net.Pipe()
		go s.ServeStream(t.Context(), theirs, Peer{}, nil)
		c := NewClient(NewStreamOf(mine, &StreamOptions{IdleTimeout: time.Second}), nil)
		defer c.Close()
		for range 3 {
			require.NoError(t, c.Call(t.Context(), "RPC.Ping", nil, nil))
			time.Sleep(time.Hour)
		}
	})
}

// Calls on one stream get their own replies, or the reason why not.
func TestStreamClient(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTest(t, newFake(), nil)
		require.NoError(t, s.Handle("Sleep", "", Read, func(_ context.Context, r *Request) (any, error) {
			ms, _ := r.Args.Int("ms", 0, 1e6)
			time.Sleep(time.Duration(ms) * time.Millisecond)
			return ms, nil
		}))
		require.NoError(t, s.Handle("Long", "", Read, func(context.Context, *Request) (any, error) {
			return strings.Repeat("x", 3<<20), nil
		}))
		st := NewStream(pipeDialer(t, s, nil, -1), &StreamOptions{MaxFrame: 2 << 20})
		c := NewClient(st, nil)
		var wg sync.WaitGroup
		for _, ms := range []int{300, 100, 200, 100} {
			wg.Go(func() {
				var got int
				if err := c.Call(t.Context(), "Sleep", map[string]int{"ms": ms}, &got); err != nil || got != ms {
					t.Errorf("%v %v", got, err)
				}
			})
		}
		wg.Wait()
		require.ErrorIs(t, c.Call(t.Context(), "Long", nil, nil), ota.ErrTooLarge)
		require.ErrorIs(t, c.Call(t.Context(), "Sleep", map[string]int{"ms": 30000}, nil), context.DeadlineExceeded)
		var e *Error
		require.ErrorAs(t, c.Call(t.Context(), "Nothing", nil, nil), &e)
		require.Equal(t, 404, e.Code)
		go func() { time.Sleep(time.Second); c.Close() }()
		require.ErrorIs(t, c.Call(t.Context(), "Sleep", map[string]int{"ms": 5000}, nil), ErrNoReply)
		require.ErrorIs(t, c.Call(t.Context(), "RPC.Ping", nil, nil), errChannelClosed)
		time.Sleep(time.Minute) // until the handlers are done
	})
}

func TestDialTransports(t *testing.T) {
	s := newTest(t, newFake(), nil)
	listeners(t, s, func(t *testing.T, network, addr string) {
		target := "tcp://" + addr
		if network == "unix" {
			target = "rpc+unix://" + addr
			info, err := os.Stat(addr)
			require.NoError(t, err)
			require.Equal(t, os.FileMode(0o600), info.Mode().Perm())
			_, err = ListenUnix(t.Context(), addr)
			require.ErrorIs(t, err, ota.ErrBusy)
		}
		c, err := Dial(t.Context(), target, nil)
		require.NoError(t, err)
		defer c.Close()
		_, err = c.BootState(t.Context())
		require.NoError(t, err)
	})
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- s.ServePacket(ctx, pc, nil) }()
	c, err := Dial(t.Context(), "udp://"+pc.LocalAddr().String()+"/", nil)
	require.NoError(t, err)
	_, err = c.BootState(t.Context())
	require.NoError(t, err)
	cancel()
	require.ErrorIs(t, <-ended, context.Canceled)
	// The system tells that nobody is there any more.
	start := time.Now()
	_, err = c.BootState(t.Context())
	require.ErrorIs(t, err, ErrNoReply)
	require.Less(t, time.Since(start), DefaultCallTimeout)
	require.NoError(t, c.Close())

	for _, target := range []string{"tcp://", "tcp://h", "udp://h:1/x", "tcp://u:p@h:1", "rpc+unix://h/x", "rpc+unix://", "what://x", "tcp://h:1?x"} {
		_, err := Dial(t.Context(), target, nil)
		require.ErrorIs(t, err, ota.ErrInvalid, target)
	}
	hook := errors.New("hook")
	_, err = Dial(t.Context(), "what://x", &ClientOptions{Dialers: map[string]Dialer{"what": func(_ context.Context, u *url.URL, _ *ClientOptions) (Channel, error) {
		require.Equal(t, "x", u.Host)
		return nil, hook
	}}})
	require.ErrorIs(t, err, hook)

	// What a dead server left behind is replaced.
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
	require.NoError(t, err)
	l.SetUnlinkOnClose(false)
	l.Close()
	again, err := ListenUnix(t.Context(), path)
	require.NoError(t, err)
	// A live one is not, also if it cannot be asked.
	_, err = ListenUnix(ctx, path)
	require.ErrorIs(t, err, context.Canceled)
	conn, err := net.Dial("unix", path)
	require.NoError(t, err)
	require.NoError(t, conn.Close())
	require.NoError(t, again.Close())
	require.NoFileExists(t, path)
}

// No more connections than allowed are served, and refused ones are closed.
func TestListenLimits(t *testing.T) {
	s := newTest(t, newFake(), nil)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	refuse := false
	ended := make(chan error, 1)
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		ended <- s.ServeListener(ctx, l, &ListenOptions{MaxConns: 2, Peer: func(net.Conn) (Peer, error) {
			if refuse {
				return Peer{}, errors.New("no")
			}
			return Peer{Channel: "TCP"}, nil
		}})
	}()
	ask := func(c net.Conn) error {
		_, err := io.WriteString(c, askState+"\n")
		if err == nil {
			_, err = io.ReadFull(c, make([]byte, len(stateReply)+2))
		}
		return err
	}
	var conns []net.Conn
	for range 3 {
		c, err := net.Dial("tcp", l.Addr().String())
		require.NoError(t, err)
		defer c.Close()
		if len(conns) < 2 {
			require.NoError(t, ask(c))
			conns = append(conns, c)
			continue
		}
		require.Error(t, ask(c))
	}
	conns[0].Close()
	require.Eventually(t, func() bool {
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			return false
		}
		defer c.Close()
		return ask(c) == nil
	}, 10*time.Second, 10*time.Millisecond)
	cancel()
	require.ErrorIs(t, <-ended, context.Canceled)
	require.Error(t, ask(conns[1]))
}

// 200 clients at once, while an update is under way: each call is answered, fast,
// in bounded memory, and nothing is left behind. Half of the calls must take less
// than 100 ms; or, on a machine that is so busy that even a line sent back by nothing
// but a loop, in between the calls, takes long, than 20 times that.
func TestCrowd(t *testing.T) {
	const clients, calls, alone = 200, 5, 101
	echo, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	var echoes sync.WaitGroup
	defer echoes.Wait()
	defer echo.Close()
	echoes.Go(func() {
		for {
			c, err := echo.Accept()
			if err != nil {
				return
			}
			echoes.Go(func() {
				defer c.Close()
				_, _ = io.Copy(c, struct{ io.Reader }{c})
			})
		}
	})
	for _, network := range []string{"tcp", "udp", "unix", "http"} {
		t.Run(network, func(t *testing.T) {
			s := newTest(t, newFake(), nil)
			before := runtime.NumGoroutine()
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			ended := make(chan error, 1)
			var target string
			switch network {
			case "udp":
				pc, err := net.ListenPacket("udp", "127.0.0.1:0")
				require.NoError(t, err)
				target = "udp://" + pc.LocalAddr().String()
				go func() { ended <- s.ServePacket(ctx, pc, &PacketOptions{MaxSources: clients + 1}) }()
			case "unix":
				path := filepath.Join(t.TempDir(), "s")
				l, err := ListenUnix(ctx, path)
				require.NoError(t, err)
				target = "rpc+unix://" + path
				go func() { ended <- s.ServeListener(ctx, l, nil) }()
			default:
				l, err := net.Listen("tcp", "127.0.0.1:0")
				require.NoError(t, err)
				target = network + "://" + l.Addr().String()
				if network == "tcp" {
					go func() { ended <- s.ServeListener(ctx, l, nil) }()
					break
				}
				web := NewHTTPServer(s)
				context.AfterFunc(ctx, func() { web.Close() })
				go func() { _ = web.Serve(l); ended <- ctx.Err() }()
			}
			pusher, err := Dial(ctx, target, nil)
			require.NoError(t, err)
			median := func(times []time.Duration) time.Duration {
				slices.Sort(times)
				return times[len(times)/2]
			}
			idle := func() time.Duration {
				var times []time.Duration
				for range alone {
					began := time.Now()
					_, err := pusher.BootState(ctx)
					require.NoError(t, err)
					times = append(times, time.Since(began))
				}
				return median(times)
			}
			single := idle()
			require.NoError(t, pusher.Call(ctx, "OTA.Begin", nil, nil))

			var heap runtime.MemStats
			runtime.GC()
			runtime.ReadMemStats(&heap)
			base := heap.HeapAlloc
			var wg sync.WaitGroup
			var mu sync.Mutex
			var times, plain []time.Duration
			start := make(chan struct{})
			for i := range clients {
				wg.Go(func() {
					c, err := Dial(ctx, target, nil)
					if err != nil {
						t.Error(err)
						return
					}
					defer c.Close()
					line, err := net.Dial("tcp", echo.Addr().String())
					if err != nil {
						t.Error(err)
						return
					}
					defer line.Close()
					<-start
					<-time.After(time.Duration(i) * 2 * time.Millisecond)
					tick := time.NewTicker(400 * time.Millisecond)
					defer tick.Stop()
					for range calls {
						<-tick.C
						began := time.Now()
						_, err := c.BootState(ctx)
						if err != nil {
							t.Error(err)
							return
						}
						mu.Lock()
						times = append(times, time.Since(began))
						mu.Unlock()
						began = time.Now()
						if _, err = io.WriteString(line, askState); err == nil {
							_, err = io.ReadFull(line, make([]byte, len(askState)))
						}
						if err != nil {
							t.Error(err)
							return
						}
						mu.Lock()
						plain = append(plain, time.Since(began))
						mu.Unlock()
					}
				})
			}
			close(start)
			all := make(chan struct{})
			go func() { wg.Wait(); close(all) }()
			peak, off := uint64(0), 0
			for running := true; running; {
				select {
				case <-all:
					running = false
				case <-time.After(10 * time.Millisecond):
				}
				require.NoError(t, pusher.Call(ctx, "OTA.Write", map[string]any{"offset": off, "data": []byte("abc")}, nil))
				runtime.ReadMemStats(&heap)
				peak, off = max(peak, heap.HeapAlloc), off+3
			}
			require.NoError(t, pusher.Call(ctx, "OTA.End", nil, nil))
			require.NoError(t, pusher.Close())
			cancel()
			require.ErrorIs(t, <-ended, context.Canceled)
			require.Equal(t, clients*calls, len(times))
			bound := max(100*time.Millisecond, 20*median(plain))
			if raceEnabled {
				bound = 5 * time.Second // it makes calls so slow that other load decides
			}
			crowd := median(times)
			t.Logf("%d clients, %d calls, %d chunks meanwhile: median %v, 99 %% %v; a line sent back %v; one client alone %v; heap at most %d KiB more",
				clients, len(times), off/3, crowd, times[len(times)*99/100], median(plain), single, (int64(peak)-int64(base))>>10)
			require.Less(t, crowd, bound)
			require.Less(t, int64(peak)-int64(base), int64(64<<20))
			require.Eventually(t, func() bool { return runtime.NumGoroutine() <= before+1 }, 10*time.Second, 5*time.Millisecond, "goroutines are left")
		})
	}
}

// slowConn is a line of so many bits per second, ten for each byte.
type slowConn struct {
	net.Conn
	baud int
}

func (c slowConn) Write(b []byte) (int, error) {
	time.Sleep(time.Duration(len(b)) * 10 * time.Second / time.Duration(c.baud))
	return c.Conn.Write(b)
}

// On a serial line a push takes little longer than its data in base64.
func TestSerialThroughput(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const baud = 115200
		data := pushData(256 << 10)
		d := newFake()
		s := newTest(t, d, nil)
		c := NewClient(NewStream(func(context.Context) (io.ReadWriteCloser, error) {
			mine, theirs := net.Pipe()
			go s.ServeStream(t.Context(), slowConn{theirs, baud}, Peer{}, SerialStream())
			return slowConn{mine, baud}, nil
		}, SerialStream()), nil)
		defer c.Close()
		start := time.Now()
		require.NoError(t, c.Push(t.Context(), bytes.NewReader(data), int64(len(data)), nil))
		require.Equal(t, data, d.got)
		took := time.Since(start)
		bound := time.Duration((len(data)+2)/3*4) * 10 * time.Second / baud
		t.Logf("%d bytes at %d baud: %v, %.0f %% of what base64 allows", len(data), baud, took, 100*bound.Seconds()/took.Seconds())
		require.Greater(t, bound.Seconds()/took.Seconds(), 0.8)
	})
}

func BenchmarkPushTCP(b *testing.B) {
	const size = 8 << 20
	data := pushData(size)
	for _, chunk := range []int{512, 32 << 10, 64 << 10} {
		b.Run(fmt.Sprint(chunk), func(b *testing.B) {
			d := newFake()
			d.update = func(_ context.Context, r io.Reader) (ota.UpdateResult, error) {
				_, err := io.Copy(io.Discard, r)
				return ota.UpdateResult{}, err
			}
			s := newTest(b, d, func(o *Options) { o.MaxFrame = 256 << 10 })
			l, err := net.Listen("tcp", "127.0.0.1:0")
			require.NoError(b, err)
			ended := make(chan error, 1)
			go func() { ended <- s.ServeListener(b.Context(), l, nil) }()
			c, err := Dial(b.Context(), "tcp://"+l.Addr().String(), nil)
			require.NoError(b, err)
			b.SetBytes(size)
			for b.Loop() {
				s.mu.Lock()
				s.update, s.due = nil, time.Time{} // no reboot
				s.mu.Unlock()
				require.NoError(b, c.Call(b.Context(), "OTA.Begin", nil, nil))
				p := pusher{c: c, r: bytes.NewReader(data), size: size, chunk: chunk}
				require.NoError(b, p.send(b.Context()))
				require.NoError(b, c.Call(b.Context(), "OTA.End", nil, nil))
			}
			c.Close()
			l.Close()
			<-ended
		})
	}
	b.Run("copy", func(b *testing.B) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		require.NoError(b, err)
		defer l.Close()
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				io.Copy(io.Discard, struct{ io.Reader }{c})
				c.Close()
			}
		}()
		b.SetBytes(size)
		for b.Loop() {
			c, err := net.Dial("tcp", l.Addr().String())
			require.NoError(b, err)
			_, err = c.Write(data)
			require.NoError(b, err)
			c.(*net.TCPConn).CloseWrite()
			io.Copy(io.Discard, c)
			c.Close()
		}
	})
}

// A channel that is closed while a call is about to be sent ends the call, which
// the receiver, who tells the others, may have missed.
func TestDatagramClosedBefore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := NewDatagram(nil, nil)
		d.conn = &closedConn{d: d}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		start := time.Now()
		_, err := d.RoundTrip(ctx, []byte(`{"id":1,"method":"RPC.Ping"}`), 1000)
		require.ErrorIs(t, err, net.ErrClosed)
		require.Zero(t, time.Since(start))
		_, err = d.RoundTrip(ctx, []byte(`{"id":2,"method":"RPC.Ping"}`), 1000)
		require.ErrorIs(t, err, errChannelClosed)
	})
}

// closedConn is a connection of d, which is closed before the first write.
type closedConn struct {
	net.Conn
	d *Datagram
}

func (c *closedConn) Write([]byte) (int, error) {
	_ = c.d.Close()
	return 0, net.ErrClosed
}
func (c *closedConn) Close() error { return nil }
