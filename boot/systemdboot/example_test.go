package systemdboot_test

import (
	"context"
	"fmt"
	"log"

	"github.com/slotota/ota/boot/driver"
	"github.com/slotota/ota/boot/systemdboot"
)

// Entries acme-a and acme-b, of either type, below /efi.
func Example() {
	loader, err := systemdboot.New(&systemdboot.Config{Entries: []string{"acme-a", "acme-b"}})
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

func ExampleParseName() {
	n := systemdboot.ParseName("acme-b+2-1.efi")
	fmt.Println(n.Base, n.Left, n.Done)
	n.Counted = false
	fmt.Println(n)
	// Output:
	// acme-b 2 1
	// acme-b.efi
}
