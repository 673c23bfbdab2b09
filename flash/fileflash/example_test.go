package fileflash_test

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/slotota/ota"
	"github.com/slotota/ota/flash/fileflash"
)

// Two slots in partitions. The one that runs is mounted, and read-only.
func ExampleOpen() {
	var slots []ota.Slot
	for _, path := range []string{"/dev/disk/by-partlabel/rootfs-a", "/dev/disk/by-partlabel/rootfs-b"} {
		f, err := fileflash.Open(path, &fileflash.Options{ReadOnlyIfMounted: true})
		if err != nil {
			fmt.Println(err)
			return
		}
		defer f.Close()
		slots = append(slots, ota.Slot{Parts: []ota.Part{{Name: "rootfs", Flash: f}}})
	}
	fmt.Println(len(slots), "slots")
}

// A file that is made on first use, for a boot record for example.
func ExampleOpen_create() {
	dir, err := os.MkdirTemp("", "ota")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer os.RemoveAll(dir)
	f, err := fileflash.Open(filepath.Join(dir, "record0"), &fileflash.Options{Create: true, Size: 4096})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer f.Close()
	fmt.Println(f.Size())
	// Output: 4096
}
