package fileflash

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"unicode/utf16"

	"github.com/slotota/ota"
)

// ErrAmbiguous is wrapped by the error of [FindPartition] if several partitions fit,
// as after a disk was copied.
var ErrAmbiguous = errors.New("several partitions fit")

// Partition is a partition of a disk.
type Partition struct {
	// Path is its device, such as /dev/mmcblk0p2; "" from [ReadPartitions].
	Path string
	// Number counts from 1.
	Number int
	// Start and Size are in bytes.
	Start, Size int64
	// Label is its name in a GPT.
	Label string
	// UUID is what the kernel calls PARTUUID, in lower case: that of the entry in a
	// GPT, or the disk's signature and the number, as in "6c586e13-02".
	UUID string
	// Type is the UUID of its type in a GPT, in lower case; or the number of the type
	// in two hexadecimal digits.
	Type string
	// Attributes are those of a GPT.
	Attributes uint64
}

// FindPartition finds a partition by "PARTLABEL=…" or "PARTUUID=…", as in the
// kernel's parameter root=, without udev: by what the kernel tells in sys, and by
// the partition tables of the disks. root is where sys and dev are, "" for "/". Paths,
// which are anything else, come back as they are. Names of labels are compared
// exactly, UUIDs regardless of case.
//
// The error wraps [ErrAmbiguous] if there are several, and fs.ErrNotExist if there is
// none; it then names the disks that could not be read.
func FindPartition(root, name string) (path string, err error) {
	if root == "" {
		root = "/"
	}
	key, value, ok := strings.Cut(name, "=")
	if !ok || key != "PARTLABEL" && key != "PARTUUID" {
		return name, nil
	}
	if value == "" {
		return "", fmt.Errorf("fileflash: %s: %w", ota.Quote(name), ota.ErrInvalid)
	}
	parts, problems := partitions(root)
	var found []string
	for _, p := range parts {
		if key == "PARTLABEL" && p.Label == value || key == "PARTUUID" && strings.EqualFold(p.UUID, value) {
			found = append(found, p.Path)
		}
	}
	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
		return "", fmt.Errorf("fileflash: %s: %w", ota.Quote(name), errors.Join(append([]error{os.ErrNotExist}, problems...)...))
	}
	return "", fmt.Errorf("fileflash: %s: %s: %w", ota.Quote(name), strings.Join(found, ", "), ErrAmbiguous)
}

// partitions returns all partitions, and why some may be missing.
func partitions(root string) (all []Partition, problems []error) {
	class := filepath.Join(root, "sys", "class", "block")
	entries, err := os.ReadDir(class)
	if err != nil {
		return nil, []error{err}
	}
	type node struct {
		Partition
		disk string
	}
	var nodes []node
	for _, e := range entries {
		dir := filepath.Join(class, e.Name())
		b, err := os.ReadFile(filepath.Join(dir, "uevent"))
		if err != nil {
			continue // gone
		}
		env := map[string]string{}
		for line := range strings.Lines(string(b)) {
			if k, v, ok := strings.Cut(strings.TrimSuffix(line, "\n"), "="); ok {
				env[k] = v
			}
		}
		n, err := strconv.Atoi(env["PARTN"])
		if env["DEVTYPE"] != "partition" || err != nil || n < 1 {
			continue
		}
		dev := env["DEVNAME"]
		if dev == "" {
			dev = e.Name()
		}
		// PARTUUID is there since Linux 6.9.
		p := Partition{Path: filepath.Join(root, "dev", dev), Number: n, Label: env["PARTNAME"], UUID: env["PARTUUID"]}
		real, err := filepath.EvalSymlinks(dir)
		if err != nil {
			continue
		}
		nodes = append(nodes, node{p, filepath.Base(filepath.Dir(real))})
	}
	tables := map[string][]Partition{}
	for _, n := range nodes {
		if n.UUID == "" {
			table, ok := tables[n.disk]
			if !ok {
				if table, err = readDisk(root, n.disk); err != nil {
					problems = append(problems, err)
				}
				tables[n.disk] = table
			}
			if i := slices.IndexFunc(table, func(p Partition) bool { return p.Number == n.Number }); i >= 0 {
				path := n.Path
				n.Partition = table[i]
				n.Path = path
			}
		}
		all = append(all, n.Partition)
	}
	return all, problems
}

// readDisk reads the partition table of a disk.
func readDisk(root, disk string) ([]Partition, error) {
	f, err := os.Open(filepath.Join(root, "dev", disk))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	sector := int64(sectorSize)
	if b, err := os.ReadFile(filepath.Join(root, "sys", "class", "block", disk, "queue", "logical_block_size")); err == nil {
		if n, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 32); err == nil {
			sector = n
		}
	}
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return nil, err
	}
	parts, err := ReadPartitions(f, size, sector)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", disk, err)
	}
	return parts, nil
}

// Bounds of what a table may demand.
const (
	maxEntries   = 1024
	maxEntrySize = 4096
	maxSector    = 64 << 10
)

// ReadPartitions reads the partition table of the disk of size bytes in r, whose
// logical sectors have sector bytes, mostly 512: a GPT (UEFI specification 2.10, section
// 5.3), of which the backup is taken if the primary one is damaged, or the four primary
// partitions of an MBR. Errors wrap ota.ErrInvalid if there is no sound table.
func ReadPartitions(r io.ReaderAt, size, sector int64) ([]Partition, error) {
	if sector < sectorSize || sector > maxSector || sector&(sector-1) != 0 || size < 2*sector {
		return nil, fmt.Errorf("partition table: %d bytes in sectors of %d: %w", size, sector, ota.ErrInvalid)
	}
	mbr := make([]byte, sectorSize)
	if err := readAll(r, mbr, 0); err != nil {
		return nil, fmt.Errorf("partition table: %w", err)
	}
	if mbr[510] != 0x55 || mbr[511] != 0xaa {
		return nil, fmt.Errorf("partition table: none: %w", ota.ErrInvalid)
	}
	parts := mbrPartitions(mbr, size)
	if !slices.ContainsFunc(parts, func(p Partition) bool { return p.Type == "ee" }) {
		return parts, nil
	}
	gpt, err := readGPT(r, size, sector, 1)
	if err != nil {
		var berr error
		if gpt, berr = readGPT(r, size, sector, size/sector-1); berr != nil {
			return nil, fmt.Errorf("partition table: %w; backup: %w", err, berr)
		}
	}
	return gpt, nil
}

func readAll(r io.ReaderAt, p []byte, off int64) error {
	n, err := r.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return err
}

func mbrPartitions(mbr []byte, size int64) (parts []Partition) {
	signature := binary.LittleEndian.Uint32(mbr[440:])
	for i := range 4 {
		e := mbr[446+16*i:][:16]
		if e[4] == 0 {
			continue
		}
		// In sectors of 512 bytes, whatever the disk has; it is an old format.
		start, n := int64(binary.LittleEndian.Uint32(e[8:]))*sectorSize, int64(binary.LittleEndian.Uint32(e[12:]))*sectorSize
		if e[4] != 0xee && (start >= size || n > size-start) {
			continue
		}
		parts = append(parts, Partition{
			Number: i + 1, Start: start, Size: n, UUID: fmt.Sprintf("%08x-%02x", signature, i+1), Type: fmt.Sprintf("%02x", e[4]),
		})
	}
	return parts
}

// readGPT reads the table whose header is in sector lba.
func readGPT(r io.ReaderAt, size, sector, lba int64) ([]Partition, error) {
	bad := func(format string, args ...any) error {
		return fmt.Errorf("GPT in sector %d: "+format+": %w", append(append([]any{lba}, args...), ota.ErrInvalid)...)
	}
	h := make([]byte, sector)
	if err := readAll(r, h, lba*sector); err != nil {
		return nil, fmt.Errorf("GPT in sector %d: %w", lba, err)
	}
	le := binary.LittleEndian
	if string(h[:8]) != "EFI PART" {
		return nil, bad("no signature")
	}
	n := int64(le.Uint32(h[12:]))
	if n < 92 || n > sector {
		return nil, bad("header of %d bytes", n)
	}
	sum := le.Uint32(h[16:])
	le.PutUint32(h[16:], 0)
	if crc32.ChecksumIEEE(h[:n]) != sum {
		return nil, bad("wrong checksum")
	}
	sectors := uint64(size / sector)
	table, count, entry := le.Uint64(h[72:]), le.Uint32(h[80:]), le.Uint32(h[84:])
	if le.Uint64(h[24:]) != uint64(lba) || table >= sectors || count > maxEntries || entry < 128 || entry > maxEntrySize || entry%8 != 0 {
		return nil, bad("%d entries of %d bytes in sector %d", count, entry, table)
	}
	b := make([]byte, int64(count)*int64(entry))
	if err := readAll(r, b, int64(table)*sector); err != nil {
		return nil, fmt.Errorf("GPT in sector %d: entries: %w", lba, err)
	}
	if crc32.ChecksumIEEE(b) != le.Uint32(h[88:]) {
		return nil, bad("wrong checksum of the entries")
	}
	var parts []Partition
	for i := range int(count) {
		e := b[i*int(entry):][:128]
		first, last := le.Uint64(e[32:]), le.Uint64(e[40:])
		if [16]byte(e[:16]) == [16]byte{} {
			continue
		}
		if first > last || last >= sectors {
			return nil, bad("partition %d: sectors %d to %d of %d", i+1, first, last, sectors)
		}
		var name []uint16
		for at := 56; at < 128 && (e[at] != 0 || e[at+1] != 0); at += 2 {
			name = append(name, le.Uint16(e[at:]))
		}
		parts = append(parts, Partition{
			Number: i + 1, Start: int64(first) * sector, Size: int64(last-first+1) * sector,
			Label: string(utf16.Decode(name)), UUID: guid(e[16:]), Type: guid(e), Attributes: le.Uint64(e[48:]),
		})
	}
	return parts, nil
}

// guid formats a GUID as EFI stores it: the first three numbers are little-endian.
func guid(b []byte) string {
	le := binary.LittleEndian
	return fmt.Sprintf("%08x-%04x-%04x-%x-%x", le.Uint32(b), le.Uint16(b[4:]), le.Uint16(b[6:]), b[8:10], b[10:16])
}
