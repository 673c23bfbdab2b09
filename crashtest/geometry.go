package crashtest

import "github.com/slotota/ota/flash/memflash"

// Geometry is a kind of flash.
type Geometry struct {
	Name string
	// Config returns a flash of this kind with at least n bytes.
	Config func(n int64) memflash.Config
}

// Geometries returns kinds of flash that differ in all that matters, odd ones
// included: with and without erase units, of one and of several sizes, with a
// short last one; program units of 1, 8, 256 and 3072 bytes; erased to 0xFF and
// 0x00; with and without a volatile cache. The first is plain NOR.
func Geometries() []Geometry {
	up := func(n, unit int64) int64 { return (max(n, 1) + unit - 1) / unit * unit }
	return []Geometry{
		{"nor-4k", func(n int64) memflash.Config {
			return memflash.Config{Size: up(n, 4<<10), EraseSize: 4 << 10}
		}},
		{"file", func(n int64) memflash.Config {
			return memflash.Config{Size: max(n, 1)}
		}},
		{"disk-unsynced", func(n int64) memflash.Config {
			return memflash.Config{Size: up(n, 512), WriteSize: 512, Unsynced: true}
		}},
		{"nor-mixed-page256-zero", func(n int64) memflash.Config {
			// As parameter sectors at the start of a bank, scaled down.
			c := memflash.Config{WriteSize: 256, ErasedZero: true}
			for i, size := 0, int64(0); size < n || i < 4; i++ {
				unit := []int64{1 << 10, 1 << 10, 2 << 10, 4 << 10}[min(i, 3)]
				c.EraseUnits = append(c.EraseUnits, unit)
				size += unit
			}
			return c
		}},
		{"nand-192k-page3072", func(n int64) memflash.Config {
			return memflash.Config{Size: up(n, 192<<10), EraseSize: 192 << 10, WriteSize: 3 << 10}
		}},
		{"nor-unit8-short-unsynced", func(n int64) memflash.Config {
			// The last erase unit is half as long as the others.
			return memflash.Config{Size: up(n, 2<<10) + 1<<10, EraseSize: 2 << 10, WriteSize: 8, Unsynced: true}
		}},
	}
}
