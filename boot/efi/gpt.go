package efi

import (
	"fmt"
	"hash/crc32"
	"io"
)

// Partition reads where partition number, counted from 1, of a GPT disk is (UEFI
// 2.10, section 5.3). It takes the primary table only, as it is there that firmware
// looks first. block is the size of a logical block in bytes; 0 means to try 512
// and 4096. Errors wrap [ErrFormat] or are those of reading.
func Partition(disk io.ReaderAt, block int64, number uint32) (HardDrive, error) {
	if block == 0 {
		h, err := Partition(disk, 512, number)
		if err != nil {
			if g, err := Partition(disk, 4096, number); err == nil {
				return g, nil
			}
		}
		return h, err
	}
	if block < 512 || block > 1<<16 {
		return HardDrive{}, fmt.Errorf("efi: partition table: blocks of %d bytes: %w", block, ErrFormat)
	}
	b := make([]byte, 92)
	if _, err := disk.ReadAt(b, block); err != nil {
		return HardDrive{}, fmt.Errorf("efi: partition table: %w", err)
	}
	size := le.Uint32(b[12:])
	sum := le.Uint32(b[16:])
	if string(b[:8]) != "EFI PART" || size != uint32(len(b)) {
		return HardDrive{}, fmt.Errorf("efi: partition table: no header at byte %d: %w", block, ErrFormat)
	}
	clear(b[16:20])
	if crc32.ChecksumIEEE(b) != sum {
		return HardDrive{}, fmt.Errorf("efi: partition table: checksum of the header: %w", ErrFormat)
	}
	start, entries, each := le.Uint64(b[72:]), le.Uint32(b[80:]), le.Uint32(b[84:])
	if number == 0 || number > entries || entries > 1024 || each < 128 || each > 4096 || start > 1<<40 {
		return HardDrive{}, fmt.Errorf("efi: partition table: no partition %d of %d: %w", number, entries, ErrFormat)
	}
	table := make([]byte, int(entries)*int(each))
	if _, err := disk.ReadAt(table, int64(start)*block); err != nil {
		return HardDrive{}, fmt.Errorf("efi: partition table: %w", err)
	}
	if crc32.ChecksumIEEE(table) != le.Uint32(b[88:]) {
		return HardDrive{}, fmt.Errorf("efi: partition table: checksum of the entries: %w", ErrFormat)
	}
	e := table[int(number-1)*int(each):][:128]
	first, last := le.Uint64(e[32:]), le.Uint64(e[40:])
	if GUID(e[:16]) == (GUID{}) || last < first {
		return HardDrive{}, fmt.Errorf("efi: partition table: there is no partition %d: %w", number, ErrFormat)
	}
	return HardDrive{number, first, last - first + 1, GUID(e[16:32])}, nil
}
