package rpcjson

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota"
)

// fakeDevice is a device whose answers a test sets.
type fakeDevice struct {
	mu        sync.Mutex
	state     ota.BootState
	busy      string
	errs      map[string]error // by method
	calls     []string
	got       []byte // what the last update read
	opts      ota.UpdateOptions
	snap      ota.SnapshotOptions
	patch     ota.BootStatePatch
	reboots   []time.Time
	progress  float64
	counts    ota.Counts
	calledOff bool // Revert leaves nothing to reboot for
	pending   bool
	findings  []ota.Finding
	// update replaces the reading of the image.
	update func(ctx context.Context, r io.Reader) (ota.UpdateResult, error)
}

func newFake() *fakeDevice {
	return &fakeDevice{state: ota.BootState{Committed: true}, errs: map[string]error{}}
}

func (d *fakeDevice) call(format string, args ...any) error {
	name := fmt.Sprintf(format, args...)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.calls = append(d.calls, name)
	return d.errs[name]
}

func (d *fakeDevice) log() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return append([]string{}, d.calls...)
}

func (d *fakeDevice) rebootTimes() []time.Time {
	d.mu.Lock()
	defer d.mu.Unlock()
	return append([]time.Time{}, d.reboots...)
}

func (d *fakeDevice) rebootCount() int { return len(d.rebootTimes()) }

type fakeImage struct{ r io.Reader }

func (i fakeImage) Info() ota.ImageInfo                          { return ota.ImageInfo{} }
func (i fakeImage) Next(context.Context) (*ota.ImagePart, error) { return nil, io.EOF }

func openFake(_ context.Context, r io.Reader) (ota.Image, error) { return fakeImage{r}, nil }

func (d *fakeDevice) Update(ctx context.Context, img ota.Image, o *ota.UpdateOptions) (ota.UpdateResult, error) {
	d.mu.Lock()
	d.opts = *o
	update := d.update
	d.mu.Unlock()
	if err := d.call("update"); err != nil {
		return ota.UpdateResult{Slot: ota.NoSlot}, err
	}
	if c, ok := img.(closingImage); ok {
		img = c.fakeImage
	}
	r := img.(fakeImage).r
	if update != nil {
		return update(ctx, r)
	}
	b, err := io.ReadAll(r)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.got = b
	return ota.UpdateResult{Slot: 1}, err
}
func (d *fakeDevice) Commit(context.Context) error { return d.call("commit") }
func (d *fakeDevice) CommitTrial(_ context.Context, id ota.TrialID) error {
	return d.call("commit %v", id)
}
func (d *fakeDevice) Revert(context.Context) error {
	err := d.call("revert")
	if err == nil {
		d.mu.Lock()
		d.pending = !d.calledOff
		d.mu.Unlock()
	}
	return err
}
func (d *fakeDevice) CreateSnapshot(_ context.Context, o *ota.SnapshotOptions) (ota.SlotID, error) {
	d.mu.Lock()
	d.snap = *o
	d.mu.Unlock()
	return 1, d.call("snapshot")
}
func (d *fakeDevice) BootState(context.Context) (ota.BootState, error) {
	err := d.call("bootstate")
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.state, err
}
func (d *fakeDevice) SetBootState(_ context.Context, p ota.BootStatePatch) error {
	d.mu.Lock()
	d.patch = p
	d.mu.Unlock()
	return d.call("setbootstate")
}
func (d *fakeDevice) Status() ota.Status {
	d.mu.Lock()
	defer d.mu.Unlock()
	return ota.Status{State: d.state, Busy: d.busy, Progress: d.progress, RebootPending: d.pending, Findings: d.findings, Counts: d.counts}
}
func (d *fakeDevice) Reboot(context.Context) error {
	d.mu.Lock()
	d.reboots = append(d.reboots, time.Now())
	d.mu.Unlock()
	return d.call("reboot")
}

// testOptions are those of the device in the test vectors.
func testOptions() Options {
	return Options{
		ID: "esp32_123456",
		Info: Info{
			App: "demo", Version: "1.0", BuildID: "20190923-002345/x", Platform: "esp32", MAC: "240AC4123456",
			OSVersion: "2.19.1", OSBuildID: "x", UID: "u", ProductID: "p",
			Usage: func() Usage {
				return Usage{Uptime: 42 * time.Second, RAMSize: 1, RAMFree: 1, RAMMinFree: 1, FSSize: 1, FSFree: 1}
			},
		},
		Open:       openFake,
		NoAuth:     true,
		AllowHosts: []string{"device"},
	}
}

// newTest returns a server for d that ends with the test.
func newTest(t testing.TB, d *fakeDevice, change func(*Options)) *Server {
	t.Helper()
	o := testOptions()
	if change != nil {
		change(&o)
	}
	s, err := newServer(d, o)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, s.Close()) })
	return s
}

var testPeer = Peer{Channel: "loopback", Addr: "here"}

// do calls a method with params and returns what stands after the dst of the
// reply: "result":… or "error":….
func do(t testing.TB, s *Server, method, params string) string {
	t.Helper()
	f := `{"src":"t","id":1,"method":"` + method + `"`
	if params != "" {
		f += `,"params":` + params
	}
	b, err := s.Call(context.Background(), testPeer, []byte(f+"}"))
	require.NoError(t, err)
	const head = `{"id":1,"src":"esp32_123456","dst":"t",`
	require.True(t, len(b) > len(head) && string(b[:len(head)]) == head, "%s", b)
	require.True(t, json.Valid(b), "%s", b)
	return string(b[len(head) : len(b)-1])
}

func readVectors(t testing.TB, name string, v any) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", name))
	require.NoError(t, err)
	require.NoError(t, json.Unmarshal(b, v))
}

// pipeNet is a network within a test, so that time can be virtual.
type pipeNet struct {
	conns chan net.Conn
	done  chan struct{}
}

// servePipes runs srv until the test ends.
func servePipes(t testing.TB, srv *http.Server) *pipeNet {
	t.Helper()
	n := &pipeNet{make(chan net.Conn), make(chan struct{})}
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
func (n *pipeNet) Close() error   { close(n.done); return nil }
func (n *pipeNet) Addr() net.Addr { return &net.UnixAddr{Name: "test"} }

// send opens a connection and sends text on it.
func (n *pipeNet) send(t testing.TB, text string) net.Conn {
	t.Helper()
	mine, theirs := net.Pipe()
	t.Cleanup(func() { mine.Close() })
	n.conns <- theirs
	_, err := io.WriteString(mine, text)
	require.NoError(t, err)
	return mine
}
