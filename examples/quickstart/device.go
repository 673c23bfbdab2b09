package main

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/slotota/ota"
	"github.com/slotota/ota/boot/bootrecord"
	"github.com/slotota/ota/bundle"
	"github.com/slotota/ota/fetch"
	"github.com/slotota/ota/flash/memflash"
	"github.com/slotota/ota/rpcjson"
)

const (
	platform = "sim"
	product  = "quickstart"
	appSize  = 1 << 20 // bytes of the part "app" of a slot
	fsSize   = 256 << 10
)

// slow makes a write take its time, as on real flash, so that there is progress
// to be seen.
var slow = memflash.Fault{Kind: memflash.Slow, On: memflash.OpWrite, Forever: true, Delay: 5 * time.Millisecond}

// device is a simulated device: a flash chip with two slots and a boot record,
// and whatever runs on it between two boots.
type device struct {
	chip   *memflash.Chip
	slots  []ota.Slot
	record []ota.Flash   // places of the copies of the boot record
	policy bundle.Policy // which bundles are accepted
	listen string        // address to serve RPC at; stays the same
	addr   string        // address to call it at
	out    *screen
	reset  chan struct{} // the reset line of this boot
	stop   func()        // ends what this boot started; nil if halted
}

// newDevice returns a device that has never run, with firmware 1.0 in slot 0.
func newDevice(key *ecdsa.PublicKey, out *screen) (*device, error) {
	app := memflash.Config{Size: appSize, EraseSize: 64 << 10, WriteSize: 256}
	fs := memflash.Config{Size: fsSize, EraseSize: 64 << 10, WriteSize: 256}
	record := memflash.Config{Size: 3 * 4096, EraseSize: 4096, WriteSize: 256}
	d := &device{
		chip:   memflash.NewChip(app, fs, app, fs, record),
		policy: bundle.Policy{Keys: []*ecdsa.PublicKey{key}},
		listen: "127.0.0.1:0",
		out:    out,
	}
	d.chip.Plan(slow)
	f := d.chip.Flashes()
	for i := range 2 {
		// The firmware writes to its file system: it need not match a digest
		// at boot.
		d.slots = append(d.slots, ota.Slot{Parts: []ota.Part{
			{Name: "app", Flash: f[2*i]},
			{Name: "fs", Flash: f[2*i+1], Mutable: true},
		}})
	}
	var err error
	d.record, err = bootrecord.Split(f[4], 3)
	return d, errors.Join(err,
		d.chip.Poke(0, content("app", "1.0", appSize), 0),
		d.chip.Poke(1, content("fs", "1.0", fsSize), 0))
}

// cutPowerAt plans a power cut for the next write to the byte at off of a flash.
func (d *device) cutPowerAt(flash int, off int64) {
	d.chip.Plan(slow, memflash.Fault{Kind: memflash.CutBits, On: memflash.OpWrite, At: d.chip.Ops(), Flash: flash, Off: off, Len: 1})
}

// boot ends what runs and boots the device: first the boot stage, then the
// firmware it hands over to, which serves RPC until the next boot.
func (d *device) boot(ctx context.Context) error {
	d.halt()

	// The boot stage. In the real world it tells the firmware which slot it
	// has started, for example on the kernel command line.
	var running ota.SlotID
	record, err := bootrecord.New(d.record, &bootrecord.Options{
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
	started := time.Now()
	version := h.State.Slot(running).Version
	if version == "" {
		version = "1.0" // what it came with
	}
	d.out.printf("  boot        slot %v, firmware %s\n", running, version)

	// The firmware.
	reset := make(chan struct{}, 1)
	dev, err := ota.Open(ctx, record, d.slots, &ota.Options{
		Platform: platform,
		Product:  product,
		// A real device leaves BootClock nil; this one has not booted when
		// its host did.
		BootClock: func() (time.Duration, error) { return time.Since(started), nil },
		// It returns before the device is gone: the server that calls it is
		// part of what ends.
		Reset: func(context.Context) error {
			select {
			case reset <- struct{}{}:
			default: // it is on its way
			}
			return nil
		},
		OnEvent:    d.out.event,
		BufferSize: 16 << 10,
	})
	if err != nil {
		return err
	}
	srv, err := rpcjson.New(dev, rpcjson.Options{
		ID:   "quickstart_1",
		Info: rpcjson.Info{App: product, Version: version, Platform: platform},
		Open: d.policy.Image,
		OpenRanges: func(ctx context.Context, f *fetch.File) (ota.Image, error) {
			img, err := d.policy.OpenRanges(ctx, f)
			if err != nil {
				return nil, err // not a nil *bundle.Reader inside of an interface
			}
			return img, nil
		},
		NoAuth: true,                                                // fine for a demonstration only
		Fetch:  &fetch.Policy{AllowHTTP: true, AllowLoopback: true}, // the firmware comes over loopback
	})
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", d.listen)
	if err != nil {
		srv.Close()
		return err
	}
	d.listen, d.addr = l.Addr().String(), callable(*l.Addr().(*net.TCPAddr))
	web := rpcjson.NewHTTPServer(srv)
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() { web.Serve(l) })
	wg.Go(func() {
		err := dev.Watch(ctx) // commits, or goes back when the time is over
		if errors.Is(err, ota.ErrReverted) {
			d.out.printf("  watch       %v\n", err)
		}
	})
	d.reset = reset
	d.stop = func() {
		cancel()
		srv.Close() // ends calls
		web.Close()
		wg.Wait()
	}
	return nil
}

// halt ends what runs on the device, if anything does.
func (d *device) halt() {
	if d.stop != nil {
		d.stop()
		d.stop = nil
	}
}

// awaitReset waits until the device pulls its reset line.
func (d *device) awaitReset(ctx context.Context) error {
	select {
	case <-d.reset:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// call calls the device as curl would: the parameters are posted to the method's
// path, and the answer is the bare result or error.
func (d *device) call(ctx context.Context, method, params string) (result string, err error) {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+d.addr+"/rpc/"+method, strings.NewReader(params))
	if err != nil {
		return "", err
	}
	req.Header.Set("Content-Type", "application/json")
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(io.LimitReader(res.Body, 1<<20))
	if err != nil {
		return "", err
	}
	result = strings.TrimSpace(string(body))
	if res.StatusCode != http.StatusOK {
		return "", fmt.Errorf("%s: %s: %s", method, res.Status, result)
	}
	return result, nil
}

// callable returns the address at which a client on this machine reaches a.
func callable(a net.TCPAddr) string {
	if a.IP.IsUnspecified() {
		a.IP = net.IPv4(127, 0, 0, 1)
	}
	return a.String()
}

// content makes up the bytes of a part.
func content(part, version string, size int) []byte {
	line := fmt.Sprintf("%-4s%-11s\n", part, version) // 16 bytes
	return bytes.Repeat([]byte(line), size/len(line))
}

// makeBundles writes a signed firmware file fw-VERSION.zip for each version, and
// returns the public key to verify them with.
func makeBundles(ctx context.Context, dir string, versions ...string) (*ecdsa.PublicKey, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	for _, v := range versions {
		m := &bundle.Manifest{Name: product, Platform: platform, Version: v, Parts: []bundle.Part{
			{Name: "app", Src: "app.bin"},
			{Name: "fs", Src: "fs.bin"},
		}}
		files := map[string]bundle.File{
			"app.bin": bytes.NewReader(content("app", v, appSize)),
			"fs.bin":  bytes.NewReader(content("fs", v, fsSize)),
		}
		var zip bytes.Buffer
		if err := bundle.Write(ctx, &zip, m, files, &bundle.WriteOptions{Keys: []crypto.Signer{key}}); err != nil {
			return nil, err
		}
		if err := os.WriteFile(filepath.Join(dir, "fw-"+v+".zip"), zip.Bytes(), 0o600); err != nil {
			return nil, err
		}
	}
	return &key.PublicKey, nil
}

// screen is where people look at, and several goroutines write to. On a terminal
// progress is a bar that moves, elsewhere one line for each phase.
type screen struct {
	mu       sync.Mutex
	w        io.Writer
	terminal bool
	bar      bool // the cursor is on the line of the bar
}

func (s *screen) printf(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.clear()
	fmt.Fprintf(s.w, format, args...)
}

// event shows the progress of the device.
func (s *screen) event(e ota.Event) {
	s.mu.Lock()
	defer s.mu.Unlock()
	done := e.Done == e.Total
	switch {
	case e.Phase == ota.PhaseFailed:
		s.clear()
		fmt.Fprintf(s.w, "  failed      %v\n", e.Err)
	case e.Total == 0:
	case s.terminal:
		fmt.Fprintf(s.w, "\r  %-11s slot %v %-3s [%-40s]", e.Phase, e.Slot, e.Part, strings.Repeat("#", int(40*e.Done/e.Total)))
		s.bar = true
		if done {
			s.clear()
		}
	case done:
		fmt.Fprintf(s.w, "  %-11s slot %v %s: %d bytes\n", e.Phase, e.Slot, e.Part, e.Total)
	}
}

// clear ends the bar.
func (s *screen) clear() {
	if s.bar {
		fmt.Fprintln(s.w)
		s.bar = false
	}
}
