package rpi_test

import (
	"log"

	"github.com/slotota/ota"
	"github.com/slotota/ota/boot/driver"
	"github.com/slotota/ota/boot/rpi"
)

// Boot partitions 2 and 3; the first partition, with autoboot.txt, is mounted at
// /bootfs.
func Example() {
	firmware, err := rpi.New(&rpi.Config{Partitions: []int{2, 3}, File: "/bootfs/autoboot.txt"})
	if err != nil {
		log.Fatal(err)
	}
	var _ driver.Driver = firmware          // for driver.New
	_ = &ota.Options{Reset: firmware.Reset} // for ota.Open: a trial begins in no other way
}
