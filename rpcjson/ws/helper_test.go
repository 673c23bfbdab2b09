package ws

import (
	"bufio"
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota"
	"github.com/slotota/ota/boot/bootrecord"
	"github.com/slotota/ota/bundle"
	"github.com/slotota/ota/flash/memflash"
	"github.com/slotota/ota/rpcjson"
)

const (
	deviceID  = "esp32_123456"
	bootState = `{"active_slot": 0, "is_committed": true, "revert_slot": 0, "commit_timeout": 0}`
	getState  = `{"src":"t","id":1,"method":"OTA.GetBootState"}`
	gotState  = `{"id":1,"src":"esp32_123456","dst":"t","result":` + bootState + `}`
)

// canned returns a server without a device, whose answers are those of the test
// vectors.
func canned(t testing.TB, change func(*rpcjson.Options)) *rpcjson.Server {
	t.Helper()
	o := rpcjson.Options{ID: deviceID, NoAuth: true, AllowHosts: []string{"device"}, AllowOrigins: []string{"https://api.cesanta.com/"}}
	if change != nil {
		change(&o)
	}
	srv, err := rpcjson.New(new(ota.Device), o)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, srv.Close()) })
	answer(t, srv, "OTA.GetBootState", bootState)
	return srv
}

// answer makes a method answer always the same.
func answer(t testing.TB, srv *rpcjson.Server, method, result string) {
	t.Helper()
	handle(t, srv, method, func(context.Context, *rpcjson.Request) (any, error) { return json.RawMessage(result), nil })
}

func handle(t testing.TB, srv *rpcjson.Server, method string, h rpcjson.HandlerFunc) {
	t.Helper()
	require.NoError(t, srv.Handle(method, "", rpcjson.Read, h))
}

// board is a device made of the real parts, on simulated flash.
type board struct {
	srv    *rpcjson.Server
	slots  []ota.Slot
	resets chan struct{}
}

func newBoard(t testing.TB, size int64) *board {
	t.Helper()
	b := &board{resets: make(chan struct{}, 1)}
	for range 2 {
		var s ota.Slot
		for _, name := range []string{"app", "fs", "nvs"} {
			s.Parts = append(s.Parts, ota.Part{Name: name, Flash: memflash.New(memflash.Config{Size: size, EraseSize: 4096})})
		}
		b.slots = append(b.slots, s)
	}
	places, err := bootrecord.Split(memflash.New(memflash.Config{Size: 64 << 10, EraseSize: 4096}), 3)
	require.NoError(t, err)
	rec, err := bootrecord.New(places, &bootrecord.Options{Running: func(context.Context) (ota.SlotID, error) { return 0, nil }})
	require.NoError(t, err)
	require.NoError(t, rec.Store(t.Context(), ota.BootState{Committed: true, Revert: ota.NoSlot}))
	dev, err := ota.Open(t.Context(), rec, b.slots, &ota.Options{
		Platform: "esp32",
		Reset:    func(context.Context) error { b.resets <- struct{}{}; return nil },
	})
	require.NoError(t, err)
	policy := &bundle.Policy{AllowUnsigned: true, AllowSHA1: true}
	b.srv, err = rpcjson.New(dev, rpcjson.Options{
		ID: deviceID, NoAuth: true, AllowOrigins: []string{"https://api.cesanta.com/"},
		Open: func(ctx context.Context, r io.Reader) (ota.Image, error) { return policy.Image(ctx, r) },
	})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, b.srv.Close()) })
	return b
}

func smallZip(t testing.TB) []byte {
	t.Helper()
	zip, err := os.ReadFile("testdata/small.zip")
	require.NoError(t, err)
	require.Len(t, zip, 2558)
	return zip
}

func readVectors(t testing.TB, path string, v any) {
	t.Helper()
	b, err := os.ReadFile(path)
	require.NoError(t, err)
	require.NoError(t, json.Unmarshal(b, v))
}

// handler returns a Handler that ends with the test.
func handler(t testing.TB, srv *rpcjson.Server, o *Options) *Handler {
	t.Helper()
	h := NewHandler(srv, o)
	t.Cleanup(func() { require.NoError(t, h.Close()) })
	return h
}

// pipeNet is a network within a test, so that time can be virtual.
type pipeNet struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func newPipeNet() *pipeNet {
	return &pipeNet{conns: make(chan net.Conn), done: make(chan struct{})}
}

// serve serves h on a new network until the test ends.
func serve(t testing.TB, h http.Handler) *pipeNet {
	t.Helper()
	n := newPipeNet()
	srv := &http.Server{Handler: h}
	ended := make(chan error, 1)
	go func() { ended <- srv.Serve(n) }()
	t.Cleanup(func() {
		require.NoError(t, srv.Close())
		require.ErrorIs(t, <-ended, http.ErrServerClosed)
	})
	return n
}

func (n *pipeNet) Accept() (net.Conn, error) {
	select {
	case c := <-n.conns:
		return c, nil
	case <-n.done:
		return nil, net.ErrClosed
	}
}
func (n *pipeNet) Close() error   { n.once.Do(func() { close(n.done) }); return nil }
func (n *pipeNet) Addr() net.Addr { return &net.UnixAddr{Name: "test"} }

// dial is a DialContext.
func (n *pipeNet) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	mine, theirs := net.Pipe()
	select {
	case n.conns <- theirs:
		return mine, nil
	case <-n.done:
		return nil, &net.OpError{Op: "dial", Net: "test", Err: net.ErrClosed}
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

const upgrade = "GET /rpc HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"

// raw is a connection on which a test sends bytes of its own.
type raw struct {
	net.Conn
	r   *bufio.Reader
	t   testing.TB
	res *http.Response
}

// upgraded sends the text of a handshake on c and reads the answer.
func upgraded(t testing.TB, c net.Conn, request string) *raw {
	t.Helper()
	t.Cleanup(func() { c.Close() })
	w := &raw{Conn: c, r: bufio.NewReader(c), t: t}
	_, err := io.WriteString(c, request)
	require.NoError(t, err)
	w.res, err = http.ReadResponse(w.r, nil)
	require.NoError(t, err)
	return w
}

// message returns a masked frame on the wire; the mask is zero.
func message(opcode byte, fin bool, payload string) string {
	if fin {
		opcode |= 0x80
	}
	head := string(opcode)
	if opcode >= 0x80 {
		head = string([]byte{opcode})
	}
	switch n := len(payload); {
	case n < 126:
		head += string([]byte{byte(n) | 0x80})
	case n < 1<<16:
		head += string([]byte{126 | 0x80, byte(n >> 8), byte(n)})
	default:
		head += string([]byte{127 | 0x80, 0, 0, 0, 0, byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)})
	}
	return head + "\x00\x00\x00\x00" + payload
}

func (w *raw) send(s string) {
	w.t.Helper()
	_, err := io.WriteString(w, s)
	require.NoError(w.t, err)
}

// frame reads a frame and returns it as on the wire, and its opcode and payload.
func (w *raw) frame() (wire []byte, opcode byte, payload string, err error) {
	head := make([]byte, 2, 10)
	if _, err = io.ReadFull(w.r, head); err != nil {
		return nil, 0, "", err
	}
	n := int(head[1] & 0x7f)
	if n == 126 {
		head = head[:4]
		if _, err = io.ReadFull(w.r, head[2:]); err != nil {
			return nil, 0, "", err
		}
		n = int(head[2])<<8 | int(head[3])
	}
	body := make([]byte, n)
	_, err = io.ReadFull(w.r, body)
	return append(head, body...), head[0] & 0xf, string(body), err
}

// text reads a text message.
func (w *raw) text() string {
	w.t.Helper()
	_, op, s, err := w.frame()
	require.NoError(w.t, err)
	require.EqualValues(w.t, 1, op, "%q", s)
	return s
}

// closed requires that the connection ends, with a closing frame of that code
// unless code is 0.
func (w *raw) closed(code int) {
	w.t.Helper()
	var got int
	for {
		_, op, s, err := w.frame()
		if err != nil {
			break
		}
		if op == 8 && len(s) >= 2 {
			got = int(s[0])<<8 | int(s[1])
			if _, err := io.WriteString(w, message(8, true, s[:2])); err != nil {
				break
			}
		}
	}
	if code != 0 {
		require.Equal(w.t, code, got)
	}
}

// newClient returns a client over ch.
func newClient(t testing.TB, url string, d *DialOptions, o *rpcjson.ClientOptions) *rpcjson.Client {
	t.Helper()
	ch, err := Dial(t.Context(), url, d)
	require.NoError(t, err)
	c := rpcjson.NewClient(ch, o)
	t.Cleanup(func() { require.NoError(t, c.Close()) })
	return c
}

// cutter is a way to a server that can be cut.
type cutter struct {
	l      net.Listener
	target string
	limit  int64 // after so many bytes to the server a connection breaks; 0 means never
	wg     sync.WaitGroup
	wait   sync.Once

	mu    sync.Mutex
	conns []net.Conn
	total int // connections so far
}

func newCutter(t testing.TB, target string, limit int64) *cutter {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	c := &cutter{l: l, target: target, limit: limit}
	c.wg.Go(c.run)
	t.Cleanup(c.end)
	return c
}

// end ends all connections, and there are no more.
func (c *cutter) end() {
	c.l.Close()
	c.wait.Do(func() {
		c.cut()
		c.wg.Wait()
	})
}

func (c *cutter) run() {
	for {
		a, err := c.l.Accept()
		if err != nil {
			return
		}
		b, err := net.DialTimeout("tcp", c.target, 10*time.Second)
		if err != nil {
			a.Close()
			continue
		}
		c.mu.Lock()
		c.conns = append(c.conns, a, b)
		c.total++
		c.mu.Unlock()
		c.wg.Go(func() {
			defer a.Close()
			defer b.Close()
			var r io.Reader = a
			if c.limit > 0 {
				r = io.LimitReader(a, c.limit)
			}
			_, _ = io.Copy(b, r)
		})
		c.wg.Go(func() {
			defer a.Close()
			defer b.Close()
			_, _ = io.Copy(a, b)
		})
	}
}

// cut ends all connections.
func (c *cutter) cut() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, k := range c.conns {
		k.Close()
	}
	c.conns = nil
}

func (c *cutter) connections() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.total
}

func wsURL(s string) string { return "ws" + strings.TrimPrefix(s, "http") }
