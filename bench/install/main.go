//go:build linux

// Install is a small program that installs a bundle, for measuring: what an update
// takes of a machine, without a daemon around it. It prints one line of JSON.
//
//	install -bundle fw.zip|http://host/fw.zip -key key.pub.pem -slot /dev/mmcblk0p3 -state dir
//
// The other slot, which counts as running, is a small file in the state directory
// unless -running names one, of which pieces may be copied.
//
// A Go program lets its heap grow to twice what is in use before it collects it, so
// the memory that an install leaves behind counts for more than what it holds. Here
// GOGC is 20 unless the environment says otherwise: there is little to collect, since
// buffers are made once, and so nothing is slower.
package main

import (
	"context"
	"crypto/ecdsa"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"runtime/pprof"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/slotota/ota"
	"github.com/slotota/ota/boot/bootrecord"
	"github.com/slotota/ota/bundle"
	"github.com/slotota/ota/fetch"
	"github.com/slotota/ota/flash/fileflash"
)

// result is what is printed.
type result struct {
	Wall, User, Sys float64 // seconds
	RSS             float64 // MiB, the most there was
	Heap            float64 // MiB, taken from the system
	Allocated       float64 // MiB, in all
	Requests        int64   // of a server
	ota.Counts
	Trial string // of the update
}

// job is what to do.
type job struct {
	bundle, key, slot, running, state string
	buffer, workers                   int
	stream                            bool
}

func main() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(20)
	}
	var j job
	flag.StringVar(&j.bundle, "bundle", "", "bundle: `file` or URL")
	flag.StringVar(&j.key, "key", "", "PEM `file` with the public key")
	flag.StringVar(&j.slot, "slot", "", "`path` of the slot to write")
	flag.StringVar(&j.running, "running", "", "`path` of the slot that runs")
	flag.StringVar(&j.state, "state", "", "`directory` of the boot record")
	flag.IntVar(&j.buffer, "buffer", 0, "ota.Options.BufferSize")
	flag.IntVar(&j.workers, "workers", 0, "bundle.Policy.Workers")
	flag.BoolVar(&j.stream, "stream", false, "read the bundle from its beginning to its end")
	profile := flag.String("profile", "", "`file` for a CPU profile")
	flag.Parse()
	if *profile != "" {
		f, err := os.Create(*profile)
		if err != nil {
			fail(err)
		}
		if err := pprof.StartCPUProfile(f); err != nil {
			fail(err)
		}
	}
	start := time.Now()
	out, err := j.run()
	pprof.StopCPUProfile()
	if err != nil {
		fail(err)
	}
	out.measure(start)
	if err := json.NewEncoder(os.Stdout).Encode(out); err != nil {
		fail(err)
	}
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "install:", err)
	os.Exit(1)
}

func (j *job) run() (r result, err error) {
	ctx := context.Background()
	b, err := os.ReadFile(j.key)
	if err != nil {
		return r, err
	}
	key, err := bundle.ParseKey(b)
	if err != nil {
		return r, err
	}
	running, old := j.running, &fileflash.Options{ReadOnly: true}
	if running == "" {
		running = filepath.Join(j.state, "running")
		old = &fileflash.Options{Create: true, Size: 4096}
	}
	var slots []ota.Slot
	for _, s := range []struct {
		path string
		o    *fileflash.Options
	}{{running, old}, {j.slot, nil}} {
		f, err := fileflash.Open(s.path, s.o)
		if err != nil {
			return r, err
		}
		defer f.Close()
		slots = append(slots, ota.Slot{Parts: []ota.Part{{Name: "rootfs", Flash: f}}})
	}
	var copies []string
	for i := range 3 {
		copies = append(copies, filepath.Join(j.state, "boot."+strconv.Itoa(i)))
	}
	record, err := bootrecord.Files(copies, &bootrecord.Options{Running: func(context.Context) (ota.SlotID, error) { return 0, nil }})
	if err != nil {
		return r, err
	}
	dev, err := ota.Open(ctx, record, slots, &ota.Options{Platform: "bench", BufferSize: j.buffer})
	if err != nil {
		return r, err
	}
	// A trial that an earlier run has left.
	if s, err := dev.BootState(ctx); err != nil {
		return r, err
	} else if !s.Committed {
		if err := dev.Revert(ctx); err != nil {
			return r, err
		}
	}
	var f *fetch.File
	if strings.Contains(j.bundle, "://") {
		f, err = fetch.Open(ctx, j.bundle, &fetch.Options{Policy: &fetch.Policy{AllowHTTP: true, AllowLoopback: true, AllowPrivate: true}})
	} else {
		f, err = fetch.OpenFile(j.bundle)
	}
	if err != nil {
		return r, err
	}
	defer f.Close()
	img := &image{f: f}
	p := &bundle.Policy{Keys: []*ecdsa.PublicKey{key}, Workers: j.workers}
	if j.stream {
		s, err := f.Stream(ctx)
		if err != nil {
			return r, err
		}
		defer s.Close()
		img.Reader, err = p.Open(ctx, s)
		if err != nil {
			return r, err
		}
	} else if img.Reader, err = p.OpenRanges(ctx, f); err != nil {
		return r, err
	}
	defer img.Close()
	res, err := dev.Update(ctx, img, nil)
	r.Counts, r.Trial, r.Requests = res.Counts, res.Trial.String(), f.Requests()
	return r, err
}

// image is a bundle that counts what was downloaded.
type image struct {
	*bundle.Reader
	f *fetch.File
}

func (i *image) Downloaded() int64 { return i.f.Downloaded() }

// measure says what was used since start.
func (r *result) measure(start time.Time) {
	r.Wall = time.Since(start).Seconds()
	var u syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_SELF, &u) == nil {
		r.User = time.Duration(u.Utime.Nano()).Seconds()
		r.Sys = time.Duration(u.Stime.Nano()).Seconds()
	}
	if b, err := os.ReadFile("/proc/self/status"); err == nil {
		for line := range strings.Lines(string(b)) {
			if f := strings.Fields(line); f[0] == "VmHWM:" {
				kib, _ := strconv.ParseFloat(f[1], 64)
				r.RSS = kib / 1024
			}
		}
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	r.Heap, r.Allocated = float64(m.HeapSys-m.HeapReleased)/(1<<20), float64(m.TotalAlloc)/(1<<20)
}
