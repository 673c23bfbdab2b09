package flashtest_test

import (
	"errors"
	"fmt"
	"io"

	"github.com/slotota/ota"
	"github.com/slotota/ota/flashtest"
)

// ramFlash is a Flash in memory that needs no erasing.
type ramFlash struct{ b []byte }

func (f *ramFlash) Size() int64 { return int64(len(f.b)) }

// Sync has nothing to do: nothing here survives a power cut anyway.
func (f *ramFlash) Sync() error { return nil }

func (f *ramFlash) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("ramflash: read at %d: %w", off, ota.ErrInvalid)
	}
	if off >= f.Size() {
		return 0, io.EOF
	}
	n := copy(p, f.b[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (f *ramFlash) WriteAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("ramflash: write at %d: %w", off, ota.ErrInvalid)
	}
	// Not off+len(p) > size, which may overflow.
	if off > f.Size() || int64(len(p)) > f.Size()-off {
		return 0, fmt.Errorf("ramflash: write of %d bytes at %d: %w", len(p), off, ota.ErrTooLarge)
	}
	return copy(f.b[off:], p), nil
}

// A Flash of one's own, checked. In a test this is
//
//	if err := flashtest.Test(f); err != nil {
//		t.Fatal(err)
//	}
func Example() {
	fmt.Println(flashtest.Test(&ramFlash{make([]byte, 64<<10)}))
	// Output: <nil>
}

// slowFlash reads half of what it is asked for.
type slowFlash struct{ ramFlash }

func (f *slowFlash) ReadAt(p []byte, off int64) (int, error) {
	return f.ramFlash.ReadAt(p[:(len(p)+1)/2], off)
}

func ExampleTest() {
	err := flashtest.Test(&slowFlash{ramFlash{make([]byte, 64<<10)}})
	fmt.Println(err)
	var v *flashtest.Violation
	fmt.Println(errors.As(err, &v), v.Rule)
	// Output:
	// flashtest: rule read-count: 4096 bytes at 0: 2048 bytes were read, without an error
	// true read-count
}
