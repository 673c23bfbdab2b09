package rpcjson

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota"
)

// wire is the client's end of a stream that a server serves, and what has come
// out of it.
type wire struct {
	net.Conn
	t     testing.TB
	mu    sync.Mutex
	out   []byte
	ended chan error // gets what ServeStream returned
}

// newWire serves one end of a pipe within a bubble.
func newWire(t testing.TB, s *Server, o *StreamOptions) *wire {
	mine, theirs := net.Pipe()
	w := &wire{Conn: mine, t: t, ended: make(chan error, 1)}
	go func() {
		w.ended <- s.ServeStream(t.Context(), theirs, Peer{Addr: "127.0.0.1:12345"}, o)
	}()
	go w.collect()
	t.Cleanup(func() { mine.Close() })
	return w
}

func (w *wire) collect() {
	b := make([]byte, 4096)
	for {
		n, err := w.Read(b)
		w.mu.Lock()
		w.out = append(w.out, b[:n]...)
		w.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// send sends text and returns what has come back, once nothing happens any more.
func (w *wire) send(text string) string {
	w.t.Helper()
	_, err := io.WriteString(w, text)
	require.NoError(w.t, err)
	synctest.Wait()
	return w.took()
}

// took returns what has come since the last time.
func (w *wire) took() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	out := string(w.out)
	w.out = nil
	return out
}

// framed returns a frame as mos sends it over a serial line.
func framed(json string) string {
	return fmt.Sprintf("\n\"\"\"%s%08x\"\"\"\n", json, crc32.ChecksumIEEE([]byte(json)))
}

const (
	askState   = `{"src":"t","id":7,"method":"OTA.GetBootState"}`
	stateReply = `{"id":7,"src":"esp32_123456","dst":"t","result":{"active_slot": 0, "is_committed": true, "revert_slot": 0, "commit_timeout": 0}}`
)

// The recorded bytes of mos are answered with the bytes it expects.
func TestStreamVectors(t *testing.T) {
	type event struct{ Dir, Data string }
	var v struct {
		Cases []struct {
			Name             string
			Events, Segments []event
			Frames           []struct{ Dir, JSON, Wire, CRC32 string }
		}
	}
	for _, file := range []string{"serial.json", "tcp.json"} {
		v.Cases = nil
		readVectors(t, file, &v)
		for _, c := range v.Cases {
			t.Run(file+"/"+c.Name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					d := newFake()
					d.errs["commit"] = ota.ErrCommitted
					s := newTest(t, d, nil)
					o := &StreamOptions{}
					if file == "serial.json" {
						o = SerialStream()
					}
					w := newWire(t, s, o)
					var want, got string
					for _, e := range append(c.Events, c.Segments...) {
						if e.Dir == "client_to_device" {
							got += w.send(e.Data)
							continue
						}
						want += e.Data
					}
					require.Greater(t, len(c.Frames), 1)
					for _, f := range c.Frames {
						// Values of the reply to OTA.End are placeholders.
						json := strings.Replace(f.JSON, `rebooting", "is_committed": true, "progress_percent": 0`, `rebooting", "is_committed": true, "progress_percent": 100`, 1)
						if json != f.JSON {
							sum := ""
							if f.CRC32 != "" {
								sum = fmt.Sprintf("%08x", crc32.ChecksumIEEE([]byte(json)))
							}
							require.Contains(t, want, f.JSON+f.CRC32)
							want = strings.Replace(want, f.JSON+f.CRC32, json+sum, 1)
						}
						if f.Dir == "device_to_client" {
							require.Equal(t, f.Wire, string(appendFrame(nil, []byte(f.JSON), shape{true, f.CRC32 != ""})))
						}
					}
					// The line feed after the last frame goes with the next reply.
					require.Equal(t, want, got+strings.Repeat("\n", len(want)-len(got)))
					if strings.HasPrefix(c.Name, "ota/") {
						require.Len(t, d.got, 2558)
					}
				})
			})
		}
	}
}

// found is what a decoder finds, in words.
func found(max int, strict bool, pieces ...string) (all []string) {
	names := map[item]string{itemFrame: "frame", itemChecked: "checked", itemHandshake: "handshake", itemText: "text", itemLong: "long", itemXON: "xon", itemXOFF: "xoff"}
	d := decoder{max: max, strict: strict, emit: func(it item, b []byte) {
		if it != itemBlank {
			all = append(all, strings.TrimSpace(names[it]+" "+string(b)))
		}
	}}
	for _, p := range pieces {
		d.feed([]byte(p))
	}
	d.flush()
	return all
}

var decoderCases = []struct {
	name, in string
	strict   bool
	want     []string
}{
	{"as mos sends it", "\n\"\"\"{\"a\":1}561bacaf\"\"\"\n", false, []string{`checked {"a":1}`}},
	{"capital digits", "\n\"\"\"{\"a\":1}561BACAF\"\"\"\n", false, []string{`checked {"a":1}`}},
	{"more after the checksum", "\n{\"a\":1}561bacaf,a,b\n", false, []string{`checked {"a":1}`}},
	{"no checksum", "\n\"\"\"{\"a\":1}\"\"\"\n", false, []string{`frame {"a":1}`}},
	{"lines", "{\"a\":1}\n{\"b\":2}\n", false, []string{`frame {"a":1}`, `frame {"b":2}`}},
	{"carriage returns", "\r\n{\"a\":1}\r\n", false, []string{`frame {"a":1}`}},
	{"quotes only", `"""{"a":1}"""{"b":2}"""`, false, []string{`frame {"a":1}`, `frame {"b":2}`}},
	{"mixed", "\"\"\"{\"a\":1}\n{\"b\":2}\"\"\"{\"c\":3}\n", false, []string{`frame {"a":1}`, `frame {"b":2}`, `frame {"c":3}`}},
	{"empty strings", "\n\"\"\"{\"\":\"\"}\"\"\"\n", false, []string{`frame {"":""}`}},
	{"end of the stream", `{"a":1}`, false, []string{`frame {"a":1}`}},
	{"cut by the end", "{\"a\":{\"b\":1},\"method\":\"x\"", false, []string{`text {"a":{"b":1},"method":"x"`}},
	{"handshake", "\"\"\"\x04\"\"\"\n\n", false, []string{"handshake \x04"[:9]}},
	{"wrong checksum", "\n{\"a\":1}561baca0\n{\"b\":2}\n", false, []string{`text {"a":1}561baca0`, `frame {"b":2}`}},
	{"part of a checksum", "\n{\"a\":1}561baca\n", false, []string{`text {"a":1}561baca`}},
	{"no checksum but text", "\n{\"a\":1} and so on\n", false, []string{`text {"a":1} and so on`}},
	{"log", "I (7) boot\n{\"a\":1}\nW (8) {odd\n", false, []string{"text I (7) boot", `frame {"a":1}`, "text W (8)", "text {odd"}},
	{"log before a frame", "I (7) {\"a\":1}\n", false, []string{"text I (7)", `frame {"a":1}`}},
	{"log before a frame, for a client", "I (7) {\"a\":1}\n{\"b\":2}\n", true, []string{`text I (7) {"a":1}`, `frame {"b":2}`}},
	{"two quotes", "\"\"{\"a\":1}\n", false, []string{`text ""`, `frame {"a":1}`}},
	{"four quotes", "\"\"\"\"{\"a\":1}\n", false, []string{`text "`, `frame {"a":1}`}},
	{"six quotes", "\"\"\"\"\"\"{\"a\":1}\n", false, []string{`frame {"a":1}`}},
	{"flow control", "\n\"\x11\"\"{\"a\x13\":1}561b\x11acaf\"\"\x13\"\n", false, []string{"xon", "xoff", "xon", "xoff", `checked {"a":1}`}},
	{"not ASCII", "{\"a\xff{\"b\":2}\n{\"c\":3}\n", false, []string{`text {"a`, `frame {"c":3}`}},
	{"not ASCII between", "\xff\x80{\"b\":2}\n", false, []string{"text \xff\x80", `frame {"b":2}`}},
	{"control character", "{\"a\x00b\":1}\n{\"c\":3}\n", false, []string{`text {"a`, `frame {"c":3}`}},
	{"tabs", "\t{\t\"a\":\t1}\t\n", false, []string{"frame {\t\"a\":\t1}"}},
	{"too long", "{\"" + strings.Repeat("a", 400) + "\":1}\n{\"b\":2}\n", false, []string{"long", `frame {"b":2}`}},
	{"a bit too long", "{\"" + strings.Repeat("a", 60) + "\":1}\n{\"b\":2}\n", false, []string{"long", `frame {"b":2}`}},
}

// However a stream is cut into reads, the same frames come out of it.
func TestDecoder(t *testing.T) {
	for _, c := range decoderCases {
		t.Run(c.name, func(t *testing.T) {
			check := func(pieces ...string) {
				t.Helper()
				got := found(60, c.strict, pieces...)
				for i, v := range got {
					if v, ok := strings.CutPrefix(v, "long "); ok {
						require.True(t, strings.HasPrefix(c.in, v))
						got[i] = "long"
					}
				}
				require.Equal(t, c.want, got)
			}
			check(c.in)
			for i := range c.in {
				for j := i; j <= len(c.in); j++ {
					if len(c.in) < 100 || j < i+2 {
						check(c.in[:i], c.in[i:j], c.in[j:])
					}
				}
			}
			check(strings.Split(c.in, "")...)
		})
	}
}

// Text is handed out in pieces, and nothing is kept of a frame that is too long.
func TestDecoderMemory(t *testing.T) {
	for _, in := range []string{"x", "{", `"`, `{"`, "\xff", "\x04", " ", "{\"a\":1}", "\n"} {
		n := 0
		d := decoder{max: 1000, emit: func(it item, b []byte) {
			require.LessOrEqual(t, len(b), 1024, in)
			n += len(b)
		}}
		for range 1 << 14 {
			d.feed([]byte(strings.Repeat(in, 8)))
			require.LessOrEqual(t, cap(d.buf), 4096, "%q", in)
		}
		d.feed([]byte("\n"))
		d.emit = func(it item, b []byte) { require.Equal(t, itemFrame, it); n = -1 }
		d.feed([]byte("{\"a\":1}\n"))
		require.Equal(t, -1, n, "%q", in)
	}
}

// noise is a megabyte of it, which ends within what looks like a frame.
func noise() []byte {
	b := make([]byte, 1<<20)
	r := rand.NewChaCha8([32]byte{6})
	r.Read(b)
	return append(b, `{"src":"x","id":9,"met`...)
}

// After any noise a good frame is served, on each kind of stream.
func TestStreamNoise(t *testing.T) {
	t.Run("serial", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w := newWire(t, newTest(t, newFake(), nil), SerialStream())
			_, err := w.Write(noise())
			require.NoError(t, err)
			w.send(framed(askState))
			time.Sleep(DefaultXOFFTimeout) // there was an XOFF in the noise
			synctest.Wait()
			require.Contains(t, w.took(), framed(stateReply))
		})
	})
	s := newTest(t, newFake(), nil)
	listeners(t, s, func(t *testing.T, network, addr string) {
		c, err := net.Dial(network, addr)
		require.NoError(t, err)
		defer c.Close()
		_, err = c.Write(append(noise(), framed(askState)...))
		require.NoError(t, err)
		require.NoError(t, c.(interface{ CloseWrite() error }).CloseWrite())
		b, err := io.ReadAll(c)
		require.NoError(t, err)
		require.Contains(t, string(b), framed(stateReply))
	})
	t.Run("stdio", func(t *testing.T) {
		in, toDevice, err := os.Pipe()
		require.NoError(t, err)
		fromDevice, out, err := os.Pipe()
		require.NoError(t, err)
		ended := make(chan error, 1)
		go func() { ended <- s.ServeStream(t.Context(), twoPipes{in, out}, Peer{}, nil) }()
		_, err = toDevice.Write(append(noise(), framed(askState)...))
		require.NoError(t, err)
		require.NoError(t, toDevice.Close())
		b, err := io.ReadAll(fromDevice)
		require.NoError(t, err)
		require.Contains(t, string(b), framed(stateReply))
		require.NoError(t, <-ended)
		require.NoError(t, fromDevice.Close())
	})
	t.Run("client", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s := newTest(t, newFake(), nil)
			mine, theirs := net.Pipe()
			go func() {
				theirs.Write(noise())
				s.ServeStream(t.Context(), theirs, Peer{}, nil)
			}()
			c := NewClient(NewStreamOf(mine, nil), nil)
			defer c.Close()
			st, err := c.BootState(t.Context())
			require.NoError(t, err)
			require.True(t, st.Committed)
		})
	})
}

// twoPipes are the standard input and output of a program.
type twoPipes struct{ in, out *os.File }

func (f twoPipes) Read(b []byte) (int, error)  { return f.in.Read(b) }
func (f twoPipes) Write(b []byte) (int, error) { return f.out.Write(b) }
func (f twoPipes) Close() error                { return errors.Join(f.in.Close(), f.out.Close()) }

// listeners runs f for a TCP and a Unix listener of s, and requires that they end
// cleanly.
func listeners(t *testing.T, s *Server, f func(t *testing.T, network, addr string)) {
	for _, network := range []string{"tcp", "unix"} {
		t.Run(network, func(t *testing.T) {
			var l net.Listener
			var err error
			if network == "tcp" {
				l, err = net.Listen("tcp", "127.0.0.1:0")
			} else {
				l, err = ListenUnix(t.Context(), filepath.Join(t.TempDir(), "s"))
			}
			require.NoError(t, err)
			before := runtime.NumGoroutine()
			ctx, cancel := context.WithCancel(t.Context())
			ended := make(chan error, 1)
			go func() { ended <- s.ServeListener(ctx, l, nil) }()
			f(t, network, l.Addr().String())
			cancel()
			require.ErrorIs(t, <-ended, context.Canceled)
			require.Eventually(t, func() bool { return runtime.NumGoroutine() <= before+1 }, 10*time.Second, 5*time.Millisecond)
		})
	}
}

// The reply has the shape that the client is known to understand.
func TestStreamShapes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWire(t, newTest(t, newFake(), nil), nil)
		require.Equal(t, "\n"+stateReply+"\n", w.send(askState+"\n"))
		require.Equal(t, "\n"+stateReply+fmt.Sprintf("%08x", crc32.ChecksumIEEE([]byte(stateReply)))+"\n",
			w.send(askState+fmt.Sprintf("%08x", crc32.ChecksumIEEE([]byte(askState)))+"\n"))
		require.Equal(t, framed(stateReply), w.send(askState+`"""`))
		require.Equal(t, framed(stateReply), w.send(askState+"\n"))

		// Damaged frames and others are not answered, and change nothing.
		for _, f := range []string{askState[1:], askState + "00000000", askState + "0", `{"id":7,"method":"OTA.Revert"`, "{}", `{"x":1}`} {
			require.Empty(t, strings.Trim(w.send(f+"\n"), "\n"), f)
		}
		require.Contains(t, w.send("\n"+askState+"\n"), framed(stateReply))
	})
}

// A reply is ASCII, whatever the result.
func TestStreamASCII(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTest(t, newFake(), nil)
		require.NoError(t, s.Handle("X", "", Read, func(_ context.Context, r *Request) (any, error) {
			v, _ := r.Args.String("v")
			return map[string]string{"v": v + "\x7fü€😀\u2028"}, nil
		}))
		w := newWire(t, s, nil)
		got := w.send(`{"id":1,"method":"X","params":{"v":"\u00e4"}}` + "\n")
		require.Equal(t, "\n"+`{"id":1,"src":"esp32_123456","result":{"v":"\u00e4`+"\x7f"+`\u00fc\u20ac\ud83d\ude00\u2028"}}`+"\n", got)
	})
}

// OTA.Write without a checksum is refused where bits can flip.
func TestStreamNeedsCRC(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newFake()
		s := newTest(t, d, nil)
		w := newWire(t, s, SerialStream())
		require.Contains(t, w.send(`{"id":1,"method":"OTA.Begin"}`+"\n"), `"result":null`)
		const write = `{"id":2,"method":"ota.write","params":{"offset":0,"data":"QUJD"}}`
		require.Contains(t, w.send(write+"\n"), `{"id":2,"src":"esp32_123456","error":{"code":400,"message":"OTA.Write needs a checksum on this line"}}`)
		require.Contains(t, w.send(framed(write)), `"result":null`)
		w.send(`{"id":3,"method":"OTA.End"}` + "\n")
		require.Equal(t, "ABC", string(d.got))
	})
}

// A frame that is too long is refused at once, and the next one is served.
func TestStreamTooLong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTest(t, newFake(), func(o *Options) { o.MaxFrame = 1000 })
		w := newWire(t, s, nil)
		got := w.send(`{"src":"t","id":5,"method":"OTA.Write","params":{"offset":0,"data":"` + strings.Repeat("QUJD", 1000))
		require.Equal(t, "\n"+`{"id":5,"src":"esp32_123456","dst":"t","error":{"code":413,"message":"frame of more than 1000 bytes"}}`+"\n", got)
		require.Empty(t, w.send(strings.Repeat("QUJD", 100000)))
		require.Equal(t, "\n"+stateReply+"\n", w.send(`"}}`+"\n"+askState+"\n"))
	})
}

// A frame may pause, but not for ever; other times do not count.
func TestStreamPause(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWire(t, newTest(t, newFake(), nil), SerialStream())
		half := len(askState) / 2
		w.send("\n" + askState[:half])
		time.Sleep(900 * time.Millisecond)
		require.Contains(t, w.send(askState[half:]+"\n"), stateReply)
		w.send("\n" + askState[:half])
		time.Sleep(1100 * time.Millisecond)
		require.Empty(t, strings.Trim(w.send(askState[half:]+"\n"), "\n"))
		w.send(askState[:half])
		time.Sleep(time.Hour)
		require.Contains(t, w.send(askState+"\n"), stateReply)
	})
}

// XOFF holds replies, XON and a handshake let them go, and so does time.
func TestStreamFlowControl(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWire(t, newTest(t, newFake(), nil), SerialStream())
		for _, release := range []string{"\x11", handshake} {
			require.Empty(t, w.send("\x13"+askState+"\n"))
			require.Contains(t, w.send(release), stateReply)
		}
		require.Empty(t, w.send("\x13"+askState+"\n"))
		time.Sleep(DefaultXOFFTimeout)
		synctest.Wait()
		require.Contains(t, w.took(), stateReply)

		plain := newWire(t, newTest(t, newFake(), nil), nil)
		require.Contains(t, plain.send("\x13"+askState+"\n"), stateReply)
	})
}

// When more calls come than are served at a time, the sender is stopped, and none
// is lost.
func TestStreamBacklog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTest(t, newFake(), nil)
		release := make(chan struct{})
		require.NoError(t, s.Handle("Wait", "", Read, func(context.Context, *Request) (any, error) {
			<-release
			return nil, nil
		}))
		o := SerialStream()
		o.MaxCalls = 2
		w := newWire(t, s, o)
		for i := range 3 {
			w.send(fmt.Sprintf("{\"id\":%d,\"method\":\"Wait\"}\n", i))
		}
		require.Equal(t, "\x13", w.took()+"\x13"[len(w.took()):])
		close(release)
		synctest.Wait()
		got := w.took()
		require.Contains(t, got, "\x11")
		require.Equal(t, 3, strings.Count(got, `"result":null`))
	})
}

// Nobody takes the replies: the stream is closed, and everything ends.
func TestStreamSlowPeer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTest(t, newFake(), nil)
		mine, theirs := net.Pipe()
		defer mine.Close()
		start := time.Now()
		go io.WriteString(mine, strings.Repeat(askState+"\n", 50))
		err := s.ServeStream(t.Context(), theirs, Peer{Addr: "here"}, nil)
		require.ErrorIs(t, err, errSlowPeer)
		require.EqualError(t, err, "rpcjson: UART here: the other side does not take what it is sent")
		require.Equal(t, DefaultWriteTimeout, time.Since(start))
	})
}

// A stream ends with its context, its server, by idleness and by its end.
func TestStreamEnds(t *testing.T) {
	t.Run("context", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s := newTest(t, newFake(), nil)
			ctx, cancel := context.WithCancelCause(t.Context())
			_, theirs := net.Pipe()
			time.AfterFunc(time.Second, func() { cancel(io.ErrNoProgress) })
			require.ErrorIs(t, s.ServeStream(ctx, theirs, Peer{}, nil), io.ErrNoProgress)
		})
	})
	t.Run("server", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s := newTest(t, newFake(), nil)
			require.NoError(t, s.Handle("Wait", "", Read, func(ctx context.Context, _ *Request) (any, error) {
				<-ctx.Done()
				return nil, ctx.Err()
			}))
			w := newWire(t, s, nil)
			w.send(`{"id":1,"method":"Wait"}` + "\n")
			require.NoError(t, s.Close())
			require.Equal(t, ErrClosed, <-w.ended)
		})
	})
	t.Run("idle", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s := newTest(t, newFake(), nil)
			require.NoError(t, s.Handle("Wait", "", Read, func(ctx context.Context, _ *Request) (any, error) {
				time.Sleep(270 * time.Second)
				return nil, nil
			}))
			start := time.Now()
			w := newWire(t, s, &StreamOptions{IdleTimeout: time.Minute})
			w.send(`{"id":1,"method":"Wait"}` + "\n")
			require.ErrorIs(t, <-w.ended, errIdle)
			require.Equal(t, 5*time.Minute, time.Since(start).Round(time.Minute))
			require.Contains(t, w.took(), "null")
		})
	})
	// Somebody who sends something all the time, but never a whole frame, is idle.
	for name, piece := range map[string]string{"slow": "x", "noise": "x\n", "blank": "\n"} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newTest(t, newFake(), nil)
				w := newWire(t, s, &StreamOptions{IdleTimeout: time.Minute})
				start := time.Now()
				w.send(`{"id":1,"method":"OTA.Status"}` + "\n")
				time.Sleep(30 * time.Second)
				w.send(`{"id":1,"method":"OTA.Status"}` + "\n{")
				for {
					if _, err := io.WriteString(w, piece); err != nil {
						break
					}
					time.Sleep(time.Second)
				}
				require.ErrorIs(t, <-w.ended, errIdle)
				require.WithinDuration(t, start.Add(90*time.Second), time.Now(), 2*time.Second)
			})
		})
	}
	t.Run("end", func(t *testing.T) {
		s := newTest(t, newFake(), nil)
		listeners(t, s, func(t *testing.T, network, addr string) {
			c, err := net.Dial(network, addr)
			require.NoError(t, err)
			defer c.Close()
			_, err = io.WriteString(c, askState) // as echo -n | nc -N does
			require.NoError(t, err)
			require.NoError(t, c.(interface{ CloseWrite() error }).CloseWrite())
			b, err := io.ReadAll(c)
			require.NoError(t, err)
			require.Equal(t, "\n"+stateReply+"\n", string(b))
		})
	})
}

// Whoever is in charge of access is asked, with what the frame carries.
func TestStreamAuthorizer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var seen []string
		s := newTest(t, newFake(), func(o *Options) {
			o.NoAuth = false
			o.Authorizer = AuthorizerFunc(func(_ context.Context, p *Peer, method string, right Right) error {
				seen = append(seen, p.Channel+" "+p.Addr+" "+method+" "+right.String()+" "+string(p.Auth))
				if len(p.Auth) == 0 {
					return ErrUnauthenticated
				}
				return nil
			})
		})
		w := newWire(t, s, nil)
		require.Contains(t, w.send(askState+"\n"), `"code":401`)
		require.Contains(t, w.send(`{"src":"t","id":7,"method":"OTA.GetBootState","auth":{"a":1}}`+"\n"), stateReply)
		require.Equal(t, []string{"UART 127.0.0.1:12345 OTA.GetBootState read ", `UART 127.0.0.1:12345 OTA.GetBootState read {"a":1}`}, seen)
	})
}

func FuzzStream(f *testing.F) {
	for _, c := range decoderCases {
		f.Add([]byte(c.in), uint8(3), c.strict)
	}
	f.Add([]byte(framed(askState)), uint8(1), true)
	f.Fuzz(func(t *testing.T, b []byte, cut uint8, strict bool) {
		const max = 300
		run := func(size int) (items []string) {
			d := decoder{max: max, strict: strict}
			d.emit = func(it item, p []byte) {
				switch it {
				case itemBlank:
					return
				case itemFrame, itemChecked:
					if len(p) > max || p[0] != '{' || p[len(p)-1] != '}' || bytes.Contains(p, []byte(oldDelimiter)) {
						t.Fatalf("frame %q", p)
					}
					for _, c := range p {
						if c >= 0x80 || c == '\n' {
							t.Fatalf("frame %q", p)
						}
					}
				default:
					if len(p) > 2*maxText {
						t.Fatalf("%d bytes of text", len(p))
					}
					p = nil // text and the beginning of a long frame may come otherwise cut
					if it == itemText || it == itemLong {
						return
					}
				}
				items = append(items, fmt.Sprint(it, string(p)))
			}
			for rest := b; len(rest) > 0; {
				n := min(size, len(rest))
				d.feed(rest[:n])
				rest = rest[n:]
			}
			if len(d.buf) > max+maxMeta+maxText {
				t.Fatalf("%d bytes kept", len(d.buf))
			}
			// A delimiter and a frame always get through.
			d.feed([]byte("\n" + framed(`{"id":1}`)))
			if n := len(items); n == 0 || items[n-1] != fmt.Sprint(itemChecked, `{"id":1}`) {
				t.Fatalf("no frame after %q", b)
			}
			return items
		}
		require.Equal(t, run(len(b)+1), run(1+int(cut)))
	})
}
