package efi_test

import (
	"context"
	"log"
	"os"

	"github.com/slotota/ota/boot/driver"
	"github.com/slotota/ota/boot/efi"
)

// A machine with one EFI system partition for the kernels of both slots, and a root
// file system for each.
func Example() {
	disk, err := os.Open("/dev/nvme0n1")
	if err != nil {
		log.Fatal(err)
	}
	defer disk.Close()
	esp, err := efi.Partition(disk, 0, 1)
	if err != nil {
		log.Fatal(err)
	}
	const cmdline = "panic=10 ro root=PARTUUID="
	firmware, err := efi.New(&efi.Config{Slots: []efi.Slot{
		{Description: "Acme A", Partition: esp, File: `\EFI\acme\a.efi`, Cmdline: cmdline + "5e1c0d4f-8c1a-4d0e-9a55-0b8e0d2f7a01"},
		{Description: "Acme B", Partition: esp, File: `\EFI\acme\b.efi`, Cmdline: cmdline + "5e1c0d4f-8c1a-4d0e-9a55-0b8e0d2f7a02"},
	}})
	if err != nil {
		log.Fatal(err)
	}
	c, err := firmware.Read(context.Background())
	if err != nil {
		log.Fatal(err)
	}
	log.Printf("slot %d starts next, trial %v", c.Active, c.Trial)
	var _ driver.Driver = firmware // for driver.New
}
