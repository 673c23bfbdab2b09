// Package transports_test carries the calls of a device over real brokers and
// real clients: the genuine Mongoose OS client (github.com/mongoose-os/mos), the
// broker mosquitto from its Debian package, and the broker
// github.com/mochi-mqtt/server.
package transports_test

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	mqttserver "github.com/mochi-mqtt/server/v2"
	"github.com/mongoose-os/mos/cli/dev"
	mosota "github.com/mongoose-os/mos/cli/ota"
	"github.com/spf13/pflag"
	"github.com/stretchr/testify/require"

	"github.com/slotota/ota"
	"github.com/slotota/ota/boot/bootrecord"
	"github.com/slotota/ota/bundle"
	"github.com/slotota/ota/fetch"
	"github.com/slotota/ota/flash/memflash"
	"github.com/slotota/ota/interop/mochi"
	"github.com/slotota/ota/rpcjson"
	"github.com/slotota/ota/rpcjson/mqtt"
)

const (
	deviceID = "esp32_123456"
	deadline = 60 * time.Second // of every wait for what happens by itself
	poll     = 5 * time.Millisecond
)

// device is made of the real parts, on simulated flash. It does not reboot.
type device struct {
	t      testing.TB
	dev    *ota.Device
	srv    *rpcjson.Server
	slots  []ota.Slot
	resets chan struct{}
}

// policy is what the device trusts.
var policy = &bundle.Policy{AllowUnsigned: true, AllowSHA1: true}

func newDevice(t testing.TB, change func(*rpcjson.Options)) *device {
	t.Helper()
	return newDeviceOf(t, 256<<10, change)
}

// newDeviceOf returns a device whose parts have room for size bytes.
func newDeviceOf(t testing.TB, size int64, change func(*rpcjson.Options)) *device {
	t.Helper()
	d := &device{t: t, resets: make(chan struct{}, 1)}
	for range 2 {
		var s ota.Slot
		for _, name := range []string{"app", "fs", "nvs"} {
			s.Parts = append(s.Parts, ota.Part{Name: name, Flash: memflash.New(memflash.Config{Size: size, EraseSize: 4096})})
		}
		d.slots = append(d.slots, s)
	}
	places, err := bootrecord.Split(memflash.New(memflash.Config{Size: 64 << 10, EraseSize: 4096}), 3)
	require.NoError(t, err)
	rec, err := bootrecord.New(places, &bootrecord.Options{Running: func(context.Context) (ota.SlotID, error) { return 0, nil }})
	require.NoError(t, err)
	require.NoError(t, rec.Store(t.Context(), ota.BootState{Committed: true, Revert: ota.NoSlot}))
	d.dev, err = ota.Open(t.Context(), rec, d.slots, &ota.Options{
		Platform: "esp32",
		Reset:    func(context.Context) error { d.resets <- struct{}{}; return nil },
	})
	require.NoError(t, err)
	o := rpcjson.Options{
		ID: deviceID, NoAuth: true, AllowOrigins: []string{"https://api.cesanta.com/"},
		Info:  rpcjson.Info{App: "demo", Platform: "esp32", Version: "1.0", MAC: "240AC4123456", UID: "u", ProductID: "p"},
		Open:  policy.Image,
		Fetch: &fetch.Policy{AllowHTTP: true, AllowLoopback: true},
	}
	if change != nil {
		change(&o)
	}
	d.srv, err = rpcjson.New(d.dev, o)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, d.srv.Close()) })
	return d
}

// canned makes a method answer always the same.
func (d *device) canned(method, result string) {
	d.t.Helper()
	require.NoError(d.t, d.srv.Handle(method, "", rpcjson.Read, func(context.Context, *rpcjson.Request) (any, error) {
		return json.RawMessage(result), nil
	}))
}

// counter registers a method that counts its calls and tells how many it was.
func (d *device) counter(method string) func() int {
	d.t.Helper()
	var mu sync.Mutex
	n := 0
	require.NoError(d.t, d.srv.Handle(method, "", rpcjson.Operate, func(context.Context, *rpcjson.Request) (any, error) {
		mu.Lock()
		defer mu.Unlock()
		n++
		return n, nil
	}))
	return func() int {
		mu.Lock()
		defer mu.Unlock()
		return n
	}
}

// installed requires that small.zip has been installed and the device is reset.
func (d *device) installed() {
	d.t.Helper()
	fs := make([]byte, 14)
	_, err := d.slots[1].Parts[1].Flash.ReadAt(fs, 0)
	require.NoError(d.t, err)
	require.Equal(d.t, "hello fs image", string(fs))
	select {
	case <-d.resets:
	case <-time.After(deadline):
		d.t.Fatal("the device was not reset")
	}
}

// serve serves the device at a broker until stop is called.
func (d *device) serve(url string, o mqtt.ServeOptions) (stop func()) {
	d.t.Helper()
	if o.MinDelay == 0 {
		o.MinDelay, o.MaxDelay = 10*time.Millisecond, 200*time.Millisecond
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.NewTextHandler(testLog{d.t}, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- mqtt.Serve(ctx, d.srv, url, &o) }()
	stop = sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-done:
			require.ErrorIs(d.t, err, context.Canceled)
		case <-time.After(deadline):
			d.t.Error("Serve does not end")
		}
	})
	d.t.Cleanup(stop)
	return stop
}

// testLog writes to the log of a test.
type testLog struct{ t testing.TB }

func (l testLog) Write(b []byte) (int, error) {
	l.t.Log(strings.TrimSpace(string(b)))
	return len(b), nil
}

// The bundle, made by the genuine tool.
var smallZip = filepath.Join("..", "..", "bundle", "testdata", "small.zip")

func readSmall(t testing.TB) []byte {
	t.Helper()
	b, err := os.ReadFile(smallZip)
	require.NoError(t, err)
	require.Len(t, b, 2558)
	return b
}

// genuine returns a connection of the genuine client.
func genuine(t testing.TB, url string, timeout time.Duration) *dev.MosDevConn {
	t.Helper()
	c := &dev.Client{Timeout: timeout}
	conn, err := c.CreateDevConn(t.Context(), url, false)
	require.NoError(t, err)
	t.Cleanup(func() { conn.RPC.Disconnect(context.Background()) })
	return conn
}

// genuinePush runs `mos ota`.
func genuinePush(t testing.TB, conn *dev.MosDevConn, file string, chunk int) error {
	t.Helper()
	return genuinePushUntil(t.Context(), t, conn, file, chunk)
}

func genuinePushUntil(ctx context.Context, t testing.TB, conn *dev.MosDevConn, file string, chunk int) error {
	t.Helper()
	require.NoError(t, pflag.CommandLine.Parse([]string{
		fmt.Sprint("--chunk-size=", chunk), "--update-timeout=600s", "--commit-timeout=300s", "ota", file,
	}))
	return mosota.OTA(ctx, conn)
}

// everyMethod calls every OTA method with the genuine client.
func everyMethod(t *testing.T, conn *dev.MosDevConn, d *device) {
	t.Helper()
	call := func(method, params string) (string, error) {
		ctx, cancel := context.WithTimeout(t.Context(), deadline)
		defer cancel()
		var args any
		if params != "" {
			args = params
		}
		b, err := conn.CallRaw(ctx, method, args)
		return string(b), err
	}
	must := func(method, params, want string) {
		t.Helper()
		got, err := call(method, params)
		require.NoError(t, err, "%s %s", method, params)
		require.Equal(t, want, got, "%s %s", method, params)
	}
	refused := func(method, params, want string) {
		t.Helper()
		got, err := call(method, params)
		require.ErrorContains(t, err, want, "%s %s: %s", method, params, got)
	}
	const rest = `{"active_slot": 0, "is_committed": true, "revert_slot": -1, "commit_timeout": 0}`
	must("OTA.GetBootState", "", rest)
	must("ota.getbootstate", "", rest)
	must("OTA.Status", "", `{"state": 0, "message": "idle", "is_committed": true, "progress_percent": 0, "commit_timeout": 0, "partition": 0}`)
	must("Sys.GetUID", "", `{"pid": "p", "app": "demo", "uid": "u"}`)
	info, err := dev.GetInfo(t.Context(), conn)
	require.NoError(t, err)
	require.Equal(t, "demo", *info.App)
	list, err := call("RPC.List", "")
	require.NoError(t, err)
	require.Contains(t, list, `"OTA.Begin"`)
	must("RPC.Describe", `{"name":"OTA.Begin"}`, `{"name": "OTA.Begin", "args_fmt": "{timeout: %d, commit_timeout: %d, size: %d}"}`)
	ping, err := call("RPC.Ping", "")
	require.NoError(t, err)
	require.Contains(t, ping, `{"channel_info": "127.0.0.1:`)

	refused("No.Such", "", "remote error 404: No handler for No.Such")
	refused("OTA.Commit", "", "remote error -1: ")
	refused("OTA.Revert", "", "remote error -1: ")
	refused("OTA.Write", `{"offset":0,"data":"aGVsbG8="}`, "remote error -1: Update not started")
	refused("OTA.End", "", "remote error -1: Update not started")
	refused("OTA.Update", "", "remote error -1: either file or url is required")
	refused("OTA.SetBootState", `{}`, "remote error -2: ")
	refused("OTA.SetBootState", `{"active_slot":7}`, "remote error -3: ")
	refused("OTA.SetBootState", `{"is_committed":"true"}`, "remote error 400: ")
	must("OTA.CreateSnapshot", "", `{"slot": 1}`)
	must("OTA.Begin", `{"size":2558}`, "null")
	must("OTA.Write", `{"offset":0,"data":"UEsD"}`, "null")
	must("OTA.Write", `{"offset":0,"data":"UEsD"}`, "null")
	refused("OTA.Write", `{"offset":2,"data":"UEsD"}`, "remote error -1: Expected offset 3, got 2")
	refused("OTA.Begin", `{"size":1}`, "Update failed to start")
	refused("OTA.End", "", "Unexpected end of data")
	must("OTA.GetBootState", "", rest)

	web := httptest.NewServer(http.FileServer(http.Dir(filepath.Dir(smallZip))))
	defer web.Close()
	must("OTA.Update", `{"url":"`+web.URL+`/small.zip","commit_timeout":300}`, "true")
	must("OTA.GetBootState", "", `{"active_slot": 1, "is_committed": false, "revert_slot": 0, "commit_timeout": 300}`)
	d.installed()
}

func readVectors(t testing.TB, path string, v any) {
	t.Helper()
	b, err := os.ReadFile(path)
	require.NoError(t, err)
	require.NoError(t, json.Unmarshal(b, v))
}

// needTool returns the path of a program of a Debian package.
func needTool(t testing.TB, name, pkg string) string {
	t.Helper()
	for _, path := range []string{name, filepath.Join("/usr/sbin", name)} {
		if p, err := exec.LookPath(path); err == nil {
			return p
		}
	}
	require.NotEqual(t, "true", os.Getenv("CI"), "needs %s: apt-get install %s", name, pkg)
	t.Skipf("needs %s: apt-get install %s", name, pkg)
	return ""
}

// freePort returns the address of a port that nobody listens on.
func freePort(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	return l.Addr().String()
}

// mosquitto is the broker from its Debian package.
type mosquitto struct {
	t    testing.TB
	dir  string
	addr string
	cmd  *exec.Cmd
	log  *os.File
}

// startMosquitto starts a broker that keeps sessions over a restart. more is
// added to its configuration; in it DIR stands for a directory with the files.
func startMosquitto(t testing.TB, more string, files map[string]string) *mosquitto {
	t.Helper()
	m := &mosquitto{t: t, dir: t.TempDir(), addr: freePort(t)}
	for name, text := range files {
		require.NoError(t, os.WriteFile(filepath.Join(m.dir, name), []byte(text), 0o600))
	}
	if more == "" {
		more = "allow_anonymous true\n"
	}
	_, port, err := net.SplitHostPort(m.addr)
	require.NoError(t, err)
	conf := "user root\npersistence true\npersistence_location DIR/\nset_tcp_nodelay true\nlistener " + port + " 127.0.0.1\n" + more
	require.NoError(t, os.WriteFile(filepath.Join(m.dir, "conf"), []byte(strings.ReplaceAll(conf, "DIR", m.dir)), 0o600))
	m.log, err = os.Create(filepath.Join(m.dir, "log"))
	require.NoError(t, err)
	t.Cleanup(func() {
		m.stop()
		m.log.Close()
		if t.Failed() {
			b, _ := os.ReadFile(m.log.Name())
			t.Logf("mosquitto: %s", b)
		}
	})
	m.start()
	return m
}

func (m *mosquitto) start() {
	m.t.Helper()
	m.cmd = exec.Command(needTool(m.t, "mosquitto", "mosquitto"), "-c", filepath.Join(m.dir, "conf"), "-v")
	m.cmd.Stdout, m.cmd.Stderr = m.log, m.log
	require.NoError(m.t, m.cmd.Start())
	require.Eventually(m.t, func() bool {
		c, err := net.Dial("tcp", m.addr)
		if err == nil {
			c.Close()
		}
		return err == nil
	}, deadline, poll, "mosquitto does not listen")
}

func (m *mosquitto) stop() {
	if m.cmd == nil {
		return
	}
	_ = m.cmd.Process.Signal(syscall.SIGTERM) // makes it save its sessions
	_ = m.cmd.Wait()
	m.cmd = nil
}

// startMochi starts the broker that is a Go library.
func startMochi(t testing.TB) (*mqttserver.Server, string) {
	t.Helper()
	s, addr := mochi.Start(t, &mqttserver.Options{InlineClient: true})
	t.Cleanup(func() { _ = s.Close() })
	return s, addr
}

// packet is an MQTT packet on its way.
type packet struct {
	head byte // type and flags
	body []byte
}

func (p packet) kind() byte { return p.head >> 4 }

// topic and payload of a PUBLISH.
func (p packet) topic() string { return string(p.body[2 : 2+int(p.body[0])<<8+int(p.body[1])]) }
func (p packet) payload() string {
	n := 2 + int(p.body[0])<<8 + int(p.body[1])
	if p.head&6 != 0 {
		n += 2
	}
	return string(p.body[n:])
}

// The packet types that tests look at.
const (
	typePublish = 3
	typePuback  = 4
)

func readPacket(r *bufio.Reader) (p packet, err error) {
	if p.head, err = r.ReadByte(); err != nil {
		return p, err
	}
	n := 0
	for shift := 0; ; shift += 7 {
		b, err := r.ReadByte()
		if err != nil {
			return p, err
		}
		n |= int(b&0x7f) << shift
		if b < 0x80 {
			break
		}
	}
	p.body = make([]byte, n)
	_, err = io.ReadFull(r, p.body)
	return p, err
}

func (p packet) wire() []byte {
	b := []byte{p.head}
	for n := len(p.body); ; {
		c := byte(n & 0x7f)
		if n >>= 7; n > 0 {
			b = append(b, c|0x80)
			continue
		}
		return append(append(b, c), p.body...)
	}
}

// way is a way to a broker on which packets can be changed and connections cut.
type way struct {
	l      net.Listener
	target string
	// up and down get each packet to and from the broker and return what is
	// passed on instead; nil passes all.
	up, down func(packet) []packet
	wg       sync.WaitGroup

	mu    sync.Mutex
	conns []net.Conn
	total int
	gate  chan struct{} // nil unless blocked
}

func newWay(t testing.TB, target string, up, down func(packet) []packet) *way {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	w := &way{l: l, target: target, up: up, down: down}
	w.wg.Go(w.run)
	t.Cleanup(func() {
		w.l.Close()
		w.cut()
		w.wg.Wait()
	})
	return w
}

func (w *way) addr() string { return w.l.Addr().String() }
func (w *way) url() string  { return "mqtt://" + w.addr() }

func (w *way) run() {
	for {
		a, err := w.l.Accept()
		if err != nil {
			return
		}
		w.mu.Lock()
		gate := w.gate
		w.mu.Unlock()
		if gate != nil {
			<-gate
		}
		b, err := net.Dial("tcp", w.target)
		if err != nil {
			a.Close()
			continue
		}
		w.mu.Lock()
		w.conns = append(w.conns, a, b)
		w.total++
		w.mu.Unlock()
		w.wg.Go(func() { pass(b, a, w.up) })
		w.wg.Go(func() { pass(a, b, w.down) })
	}
}

func pass(to, from net.Conn, change func(packet) []packet) {
	defer to.Close()
	defer from.Close()
	if change == nil {
		_, _ = io.Copy(to, from)
		return
	}
	r := bufio.NewReader(from)
	for {
		p, err := readPacket(r)
		if err != nil {
			return
		}
		for _, q := range change(p) {
			if _, err := to.Write(q.wire()); err != nil {
				return
			}
		}
	}
}

// cut ends all connections.
func (w *way) cut() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, c := range w.conns {
		c.Close()
	}
	w.conns = nil
}

// block ends all connections, and lets none through until release is called.
func (w *way) block() (release func()) {
	gate := make(chan struct{})
	w.mu.Lock()
	w.gate = gate
	w.mu.Unlock()
	w.cut()
	return sync.OnceFunc(func() {
		w.mu.Lock()
		w.gate = nil
		w.mu.Unlock()
		close(gate)
	})
}

func (w *way) connections() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.total
}

// settled requires that no more goroutines than n are left, and a few that wait
// for that.
func settled(t testing.TB, n int) {
	t.Helper()
	for end := time.Now().Add(deadline); runtime.NumGoroutine() > n+3; runtime.Gosched() {
		if time.Now().After(end) {
			b := make([]byte, 1<<20)
			t.Fatalf("%d goroutines, %d before:\n%s", runtime.NumGoroutine(), n, b[:runtime.Stack(b, true)])
		}
	}
}
