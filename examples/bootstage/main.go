// Bootstage is the boot step of a device that has no boot loader with a boot
// state of its own, for the initramfs or whatever calls kexec. It decides which
// slot to start, once per boot and before anything of a slot runs:
//
//	choice=$(bootstage -slot0 /dev/mmcblk0p2 -slot1 /dev/mmcblk0p3 -state /state) || exec recovery
//	eval "$choice" # slot=0 or slot=1
//	mount -o ro "/dev/mmcblk0p$((slot + 2))" /new
//	kexec -l /new/boot/vmlinuz --append="root=… ota.slot=$slot" && kexec -e
//
// It prints slot=N and exits with status 0, or with 1 if no slot may be started.
// A slot that cannot be opened is one that may not be started, no more. The rest
// of the story is examples/daemon.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math"
	"os"
	"path/filepath"

	"github.com/slotota/ota"
	"github.com/slotota/ota/boot/bootrecord"
	"github.com/slotota/ota/flash/fileflash"
)

func main() {
	slot0 := flag.String("slot0", "", "`path` of slot 0")
	slot1 := flag.String("slot1", "", "`path` of slot 1")
	state := flag.String("state", "", "`directory` of the boot record; it must be mounted, and writable")
	flag.Parse()
	h, err := choose(context.Background(), *slot0, *slot1, *state)
	if err != nil {
		fmt.Fprintln(os.Stderr, "bootstage:", err)
		os.Exit(1)
	}
	if h.Problem != nil {
		fmt.Fprintln(os.Stderr, "bootstage:", h.Problem)
	}
	fmt.Printf("slot=%d\n", h.Slot)
}

// choose verifies the slots and uses up a boot of a firmware on trial.
func choose(ctx context.Context, slot0, slot1, state string) (ota.Handover, error) {
	var slots []ota.Slot
	var gone [2]error // why a slot cannot be opened
	for i, path := range []string{slot0, slot1} {
		var flash ota.Flash
		f, err := fileflash.Open(path, &fileflash.Options{ReadOnly: true})
		if err == nil {
			defer f.Close()
			flash = f
		} else {
			gone[i] = err
			flash = &noFlash{err}
		}
		slots = append(slots, ota.Slot{Parts: []ota.Part{{Name: "rootfs", Flash: flash}}})
	}
	if gone[0] != nil && gone[1] != nil {
		return ota.Handover{}, fmt.Errorf("%w: %w", ota.ErrNotBootable, errors.Join(gone[:]...))
	}
	var copies []string
	for _, name := range []string{"boot.0", "boot.1", "boot.2"} {
		copies = append(copies, filepath.Join(state, name))
	}
	record, err := bootrecord.Files(copies, nil)
	if err != nil {
		return ota.Handover{}, err
	}
	h, err := ota.Boot(ctx, record, slots, &ota.BootOptions{
		// What the device came with has no digests yet, and is not read.
		Check: func(_ context.Context, id ota.SlotID) error { return gone[id] },
	})
	for _, g := range gone {
		if err == nil && g != nil && !errors.Is(h.Problem, g) { // it was not needed
			h.Problem = errors.Join(h.Problem, g)
		}
	}
	return h, err
}

// noFlash stands for a slot that cannot be opened.
type noFlash struct{ err error }

func (f *noFlash) ReadAt([]byte, int64) (int, error)  { return 0, f.err }
func (f *noFlash) WriteAt([]byte, int64) (int, error) { return 0, f.err }
func (f *noFlash) Sync() error                        { return f.err }
func (f *noFlash) Size() int64                        { return math.MaxInt64 } // nothing is too large to be read
