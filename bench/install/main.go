//go:build linux

// Install is a small program that installs a local bundle, for measuring: what an
// update takes of a machine, without a daemon around it. It prints one line of JSON.
//
//	install -bundle fw.zip -key key.pub.pem -slot /dev/mmcblk0p3 -state dir
//
// The other slot, which counts as running, is a small file in the state directory
// unless -running names one.
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
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/slotota/ota"
	"github.com/slotota/ota/boot/bootrecord"
	"github.com/slotota/ota/bundle"
	"github.com/slotota/ota/flash/fileflash"
)

// result is what is printed.
type result struct {
	Wall, User, Sys float64 // seconds
	RSS             float64 // MiB, the most there was
	Heap            float64 // MiB, taken from the system
	Allocated       float64 // MiB, in all
	ota.Counts
	Trial string // of the update
}

func main() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(20)
	}
	var bundlePath, key, slot, running, state string
	var buffer int
	flag.StringVar(&bundlePath, "bundle", "", "bundle `file`")
	flag.StringVar(&key, "key", "", "PEM `file` with the public key")
	flag.StringVar(&slot, "slot", "", "`path` of the slot to write")
	flag.StringVar(&running, "running", "", "`path` of the slot that runs")
	flag.StringVar(&state, "state", "", "`directory` of the boot record")
	flag.IntVar(&buffer, "buffer", 0, "ota.Options.BufferSize")
	flag.Parse()
	start := time.Now()
	res, err := install(bundlePath, key, slot, running, state, buffer)
	if err != nil {
		fmt.Fprintln(os.Stderr, "install:", err)
		os.Exit(1)
	}
	out := measure(start)
	out.Counts, out.Trial = res.Counts, res.Trial.String()
	json.NewEncoder(os.Stdout).Encode(out)
}

func install(bundlePath, keyPath, slot, running, state string, buffer int) (res ota.UpdateResult, err error) {
	ctx := context.Background()
	b, err := os.ReadFile(keyPath)
	if err != nil {
		return res, err
	}
	key, err := bundle.ParseKey(b)
	if err != nil {
		return res, err
	}
	old := &fileflash.Options{}
	if running == "" {
		running = filepath.Join(state, "running")
		old = &fileflash.Options{Create: true, Size: 4096}
	}
	var slots []ota.Slot
	for _, s := range []struct {
		path string
		o    *fileflash.Options
	}{{running, old}, {slot, nil}} {
		f, err := fileflash.Open(s.path, s.o)
		if err != nil {
			return res, err
		}
		defer f.Close()
		slots = append(slots, ota.Slot{Parts: []ota.Part{{Name: "rootfs", Flash: f}}})
	}
	var copies []string
	for i := range 3 {
		copies = append(copies, filepath.Join(state, "boot."+strconv.Itoa(i)))
	}
	record, err := bootrecord.Files(copies, &bootrecord.Options{Running: func(context.Context) (ota.SlotID, error) { return 0, nil }})
	if err != nil {
		return res, err
	}
	dev, err := ota.Open(ctx, record, slots, &ota.Options{Platform: "bench", BufferSize: buffer})
	if err != nil {
		return res, err
	}
	// A trial that an earlier run has left.
	if s, err := dev.BootState(ctx); err != nil {
		return res, err
	} else if !s.Committed {
		if err := dev.Revert(ctx); err != nil {
			return res, err
		}
	}
	zip, err := os.Open(bundlePath)
	if err != nil {
		return res, err
	}
	defer zip.Close()
	img, err := (&bundle.Policy{Keys: []*ecdsa.PublicKey{key}}).Open(ctx, zip)
	if err != nil {
		return res, err
	}
	return dev.Update(ctx, img, nil)
}

// measure says what was used since start.
func measure(start time.Time) (r result) {
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
	return r
}
