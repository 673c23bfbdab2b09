package efibootguard_test

import (
	"context"
	"log"
	"time"

	"github.com/slotota/ota/boot/driver"
	"github.com/slotota/ota/boot/efibootguard"
)

// Config partitions that are mounted at /boot/a and /boot/b. The watchdog gives a
// boot one minute.
func Example() {
	loader, err := efibootguard.New(&efibootguard.Config{
		Slots: []efibootguard.Slot{
			{File: "/boot/a/BGENV.DAT", Name: "A", Kernel: "C:BOOT0:vmlinuz", Args: "root=/dev/sda4 ota.slot=A"},
			{File: "/boot/b/BGENV.DAT", Name: "B", Kernel: "C:BOOT1:vmlinuz", Args: "root=/dev/sda5 ota.slot=B"},
		},
		Watchdog: time.Minute,
	})
	if err != nil {
		log.Fatal(err)
	}
	c, err := loader.Read(context.Background())
	if err != nil {
		log.Fatal(err)
	}
	log.Printf("slot %d starts next, trial %v", c.Active, c.Trial)
	var _ driver.Driver = loader // for driver.New
}
