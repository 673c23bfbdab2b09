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
// The rest of the story is examples/daemon.
package main

import (
	"context"
	"flag"
	"fmt"
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
	for _, path := range []string{slot0, slot1} {
		f, err := fileflash.Open(path, &fileflash.Options{ReadOnly: true})
		if err != nil {
			return ota.Handover{}, err
		}
		defer f.Close()
		slots = append(slots, ota.Slot{Parts: []ota.Part{{Name: "rootfs", Flash: f}}})
	}
	var copies []string
	for _, name := range []string{"boot.0", "boot.1", "boot.2"} {
		copies = append(copies, filepath.Join(state, name))
	}
	record, err := bootrecord.Files(copies, nil)
	if err != nil {
		return ota.Handover{}, err
	}
	return ota.Boot(ctx, record, slots, nil)
}
