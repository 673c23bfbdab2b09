// Package mos_test drives devices with the genuine Mongoose OS client, module
// github.com/mongoose-os/mos: its RPC stack (common/mgrpc), its device connection
// (cli/dev), its update command (cli/ota), and its reader and writer of bundles
// (common/fwbundle).
package mos_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/mongoose-os/mos/cli/dev"
	"github.com/mongoose-os/mos/cli/rpccreds"
	"github.com/mongoose-os/mos/common/mgrpc/codec"
	"github.com/mongoose-os/mos/common/mgrpc/frame"
	"github.com/stretchr/testify/require"

	"github.com/slotota/ota"
	"github.com/slotota/ota/boot/bootrecord"
	"github.com/slotota/ota/bundle"
	"github.com/slotota/ota/fetch"
	"github.com/slotota/ota/flash/memflash"
	"github.com/slotota/ota/rpcjson"
)

const (
	deadline = 60 * time.Second // of every wait for what happens by itself
	poll     = 5 * time.Millisecond
)

// rig is a simulated device: two slots and a boot record on one chip, and an
// RPC server on a port of 127.0.0.1 that stays the same over reboots.
type rig struct {
	t     *testing.T
	chip  *memflash.Chip
	slots []ota.Slot
	addr  string
	opt   rigOptions

	reset chan struct{} // of the device's reset line
	stop  context.CancelFunc
	done  chan struct{}

	mu       sync.Mutex
	handover ota.Handover
	boots    int
	calls    []frame.Frame // requests in the order they came
}

// rigOptions configure a rig. The zero value accepts unsigned bundles.
type rigOptions struct {
	policy *bundle.Policy
	// auth decides who may call; nil lets everybody.
	auth rpcjson.Authorizer
	// timeout is the client's flag of that name; 0 means deadline.
	timeout time.Duration
	// fault says what happens to a request over HTTP.
	fault func(f *frame.Frame) fault
	// also listens on another transport, at each boot, and returns what serves
	// there.
	also func() (func(ctx context.Context, srv *rpcjson.Server) error, error)
}

// fault is what happens to a request.
type fault uint8

const (
	none      fault = iota
	loseCall        // the connection breaks before the device has seen it
	loseReply       // the device acts, but the connection breaks before it answers
)

const (
	appSize = 64 << 10
	fsSize  = 16 << 10
)

var (
	factoryApp = bytes.Repeat([]byte("factory!"), appSize/8)
	factoryFS  = bytes.Repeat([]byte("settings"), fsSize/8)
)

// newRig returns a device that runs its factory firmware in slot 0.
func newRig(t *testing.T, o rigOptions) *rig {
	t.Helper()
	if o.policy == nil {
		o.policy = &bundle.Policy{AllowUnsigned: true}
	}
	if o.timeout == 0 {
		o.timeout = deadline
	}
	app := memflash.Config{Size: appSize, EraseSize: 4 << 10, WriteSize: 256, Unsynced: true}
	fs := memflash.Config{Size: fsSize, EraseSize: 4 << 10, WriteSize: 256, Unsynced: true}
	record := memflash.Config{Size: 4 << 10, EraseSize: 4 << 10, WriteSize: 256, Unsynced: true}
	d := &rig{
		t:     t,
		chip:  memflash.NewChip(app, fs, app, fs, record, record, record),
		opt:   o,
		reset: make(chan struct{}, 1),
		done:  make(chan struct{}),
	}
	f := d.chip.Flashes()
	for i := range 2 {
		d.slots = append(d.slots, ota.Slot{Parts: []ota.Part{
			{Name: "app", Flash: f[2*i]},
			{Name: "fs", Flash: f[2*i+1]},
		}})
	}
	require.NoError(t, d.chip.Poke(0, factoryApp, 0))
	require.NoError(t, d.chip.Poke(1, factoryFS, 0))

	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	d.addr = l.Addr().String()
	ctx, stop := context.WithCancel(context.Background())
	d.stop = stop
	started := make(chan struct{})
	go d.run(ctx, l, sync.OnceFunc(func() { close(started) }))
	t.Cleanup(d.close)
	<-started
	require.False(t, t.Failed())
	return d
}

// close switches the device off and checks that it was never misused.
func (d *rig) close() {
	d.stop()
	<-d.done
	require.NoError(d.t, d.chip.Err())
}

// run is the life of the device: one boot after the other. It calls started once
// it serves, or has failed.
func (d *rig) run(ctx context.Context, l net.Listener, started func()) {
	defer close(d.done)
	defer started()
	for {
		err := d.boot(ctx, l, started)
		if ctx.Err() != nil {
			return
		}
		if err == nil || errors.Is(err, memflash.ErrPowerOff) {
			l, err = net.Listen("tcp", d.addr)
		}
		if err != nil {
			d.t.Errorf("the device does not boot: %v", err)
			return
		}
	}
}

// boot boots the device and serves on l until it is reset.
func (d *rig) boot(ctx context.Context, l net.Listener, started func()) error {
	defer l.Close()
	d.chip.PowerOn()
	begun := time.Now()
	var running ota.SlotID
	record, err := bootrecord.New(d.chip.Flashes()[4:], &bootrecord.Options{
		Running: func(context.Context) (ota.SlotID, error) { return running, nil },
	})
	if err != nil {
		return err
	}
	h, err := ota.Boot(ctx, record, d.slots, nil)
	if err != nil {
		return err
	}
	running = h.Slot
	device, err := ota.Open(ctx, record, d.slots, &ota.Options{
		Platform:  "esp32",
		Product:   "demo",
		BootClock: func() (time.Duration, error) { return time.Since(begun), nil },
		Reset: func(context.Context) error {
			select {
			case d.reset <- struct{}{}:
			default: // is on its way
			}
			return nil
		},
	})
	if err != nil {
		return err
	}
	version, buildID := "1.0", "20250101-000000/factory"
	if st := h.State.Slot(h.Slot); st.Version != "" {
		version, buildID = st.Version, st.BuildID
	}
	srv, err := rpcjson.New(device, rpcjson.Options{
		ID:         "esp32_123456",
		Info:       rpcjson.Info{App: "demo", Platform: "esp32", Version: version, BuildID: buildID, MAC: "240AC4123456", OSVersion: "2.20.0"},
		Open:       d.opt.policy.Image,
		NoAuth:     d.opt.auth == nil,
		Authorizer: d.opt.auth,
		Fetch:      &fetch.Policy{AllowHTTP: true, AllowLoopback: true},
		OpenFile: func(name string) (io.ReadCloser, error) {
			return os.OpenInRoot(testdata, name)
		},
	})
	if err != nil {
		return err
	}
	defer srv.Close()
	also := func(ctx context.Context, _ *rpcjson.Server) error { <-ctx.Done(); return nil }
	if d.opt.also != nil {
		if also, err = d.opt.also(); err != nil {
			return err
		}
	}
	d.mu.Lock()
	d.handover = h
	d.boots++
	d.mu.Unlock()

	ctx, off := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer off()
	wg.Go(func() {
		err := device.Watch(ctx)
		if err != nil && ctx.Err() == nil && !errors.Is(err, ota.ErrReverted) && !errors.Is(err, memflash.ErrPowerOff) {
			d.t.Errorf("watch: %v", err)
		}
	})
	wg.Go(func() {
		if err := also(ctx, srv); ctx.Err() == nil {
			d.t.Errorf("serve: %v", err)
		}
	})
	hs := &http.Server{Handler: d.handler(srv)}
	wg.Go(func() { hs.Serve(l) })
	defer hs.Close()
	started()

	select {
	case <-d.reset:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// handler notes each request, and lets faults happen to it.
func (d *rig) handler(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		r.Body = io.NopCloser(bytes.NewReader(body))
		var f frame.Frame
		if err := json.Unmarshal(body, &f); err != nil {
			d.t.Errorf("not a frame: %v: %q", err, body)
			return
		}
		d.mu.Lock()
		d.calls = append(d.calls, f)
		what := none
		if d.opt.fault != nil {
			what = d.opt.fault(&f)
		}
		d.mu.Unlock()
		switch what {
		case none:
			next.ServeHTTP(w, r)
			return
		case loseReply:
			next.ServeHTTP(&nowhere{}, r)
		}
		panic(http.ErrAbortHandler)
	})
}

// nowhere is a http.ResponseWriter whose answers get lost.
type nowhere struct{ header http.Header }

func (n *nowhere) Header() http.Header {
	if n.header == nil {
		n.header = http.Header{}
	}
	return n.header
}
func (n *nowhere) WriteHeader(int)             {}
func (n *nowhere) Write(b []byte) (int, error) { return len(b), nil }

// url is the address for the client, which wants the path spelled out.
func (d *rig) url() string { return "http://" + d.addr + "/rpc" }

// connect returns a connection of the genuine client.
func (d *rig) connect() *dev.MosDevConn {
	d.t.Helper()
	return d.connectTo(d.url())
}

func (d *rig) connectTo(url string) *dev.MosDevConn {
	d.t.Helper()
	c := &dev.Client{Timeout: d.opt.timeout}
	// The context ends the client's receive loop.
	conn, err := c.CreateDevConnWithOpts(d.t.Context(), url, false, nil, &codec.Options{
		HTTPOut: codec.OutboundHTTPCodecOptions{GetCredsCallback: rpccreds.GetRPCCreds}, // as the command does
	})
	require.NoError(d.t, err)
	d.t.Cleanup(func() { conn.RPC.Disconnect(context.Background()) })
	return conn
}

// call calls method and returns the result as it came.
func (d *rig) call(method, params string) (string, error) {
	d.t.Helper()
	ctx, cancel := context.WithTimeout(d.t.Context(), deadline)
	defer cancel()
	var args any
	if params != "" {
		args = params
	}
	b, err := d.connect().CallRaw(ctx, method, args)
	return string(b), err
}

// must calls method, which has to succeed.
func (d *rig) must(method, params string) string {
	d.t.Helper()
	res, err := d.call(method, params)
	require.NoErrorf(d.t, err, "%s %s", method, params)
	return res
}

// refused calls method, which has to fail with the words that the client prints.
func (d *rig) refused(method, params, want string) {
	d.t.Helper()
	res, err := d.call(method, params)
	require.EqualErrorf(d.t, err, want, "%s %s: %s", method, params, res)
}

// bootCount returns how often the device has booted.
func (d *rig) bootCount() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.boots
}

// afterBoot waits until the device has booted n times in all and answers, and
// returns what the boot stage handed over to.
func (d *rig) afterBoot(n int) ota.Handover {
	d.t.Helper()
	require.Eventuallyf(d.t, func() bool { return d.bootCount() >= n }, deadline, poll, "boot %d", n)
	require.Equal(d.t, n, d.bootCount(), "boots")
	d.must("RPC.Ping", "")
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.handover
}

// powerCycle takes the power away for a moment and waits until the device is
// back.
func (d *rig) powerCycle() ota.Handover {
	d.t.Helper()
	n := d.bootCount()
	d.chip.PowerOff(memflash.LoseAll, 0)
	d.reset <- struct{}{}
	return d.afterBoot(n + 1)
}

// requests returns the requests so far, in order.
func (d *rig) requests() []frame.Frame {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.calls)
}

// methods returns their methods.
func (d *rig) methods() (names []string) {
	for _, f := range d.requests() {
		names = append(names, f.Method)
	}
	return names
}

// requireFactory checks that slot 0 holds what the device came with.
func (d *rig) requireFactory() {
	d.t.Helper()
	require.Equal(d.t, factoryApp, d.part(0, 0, appSize))
	require.Equal(d.t, factoryFS, d.part(0, 1, fsSize))
}

// part returns the first n bytes of a part of a slot; part 0 is the app.
func (d *rig) part(slot ota.SlotID, part, n int) []byte {
	d.t.Helper()
	b := make([]byte, n)
	require.NoError(d.t, d.chip.Peek(2*int(slot)+part, b, 0))
	return b
}

// status is the answer to OTA.Status.
type status struct {
	State         int    `json:"state"`
	Message       string `json:"message"`
	IsCommitted   bool   `json:"is_committed"`
	Progress      int    `json:"progress_percent"`
	CommitTimeout int    `json:"commit_timeout"`
	Partition     int    `json:"partition"`
}

func (d *rig) status() (s status) {
	d.t.Helper()
	require.NoError(d.t, json.Unmarshal([]byte(d.must("OTA.Status", "")), &s))
	return s
}

// The answers to OTA.GetBootState of a device at rest.
const (
	committed0 = `{"active_slot": 0, "is_committed": true, "revert_slot": -1, "commit_timeout": 0}`
	committed1 = `{"active_slot": 1, "is_committed": true, "revert_slot": -1, "commit_timeout": 0}`
)

// testdata has bundles that the genuine tool made; package bundle tests with
// them, too. As files they are also in the file system of a rig.
var testdata = filepath.Join("..", "..", "bundle", "testdata")

// recorded returns the path of one of them.
func recorded(t *testing.T, name string) string {
	t.Helper()
	path := filepath.Join(testdata, name)
	require.FileExists(t, path)
	return path
}
