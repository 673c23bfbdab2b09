// Package mcuboot reads and verifies MCUboot images, reads and writes the trailers
// by which firmware and loader talk to each other, and drives MCUboot in its swap
// modes ([Swap]) and in direct-XIP mode ([Driver]).
//
// # Images
//
// [VerifyImage] checks structure, hash and signature (ECDSA P-256 or Ed25519), as
// the loader does. What an image says about itself in its trailing area counts only
// if it is in the protected part, which is signed.
//
// # Swap modes
//
// In these modes (using scratch, using move) firmware always runs from the primary area:
// the loader exchanges the content of both areas before it starts a trial, and again to go
// back. [Swap] drives it. A slot is an image there, and moves: slot 0 is the one that the
// device came with, in the primary area, and an update goes to the slot whose image is
// in the secondary one. Which is where follows from the digests in the library's records
// ([ByDigest]), and does not change between two resets; [Swap.Image] gives the place of
// a slot until the next one. So open slots after each reset, not once.
//
// The loader's trailers decide, each by one program operation: the magic in the secondary
// area begins a trial, image_ok in the primary one confirms it; without that the loader
// goes back at the next reset, to go back needs no write. What was on trial is then in the
// secondary area, untouched. The loader refuses to swap in what is not a valid image, and
// the library takes note. Firmware that runs already cannot be put on trial, as
// SetAsRevert of a snapshot would.
//
// A program that does without slots has the same functions: write the image into the secondary
// area, verify it, call [Trailer.SetPending], reboot, and call [Trailer.Confirm] on the
// primary area; [NextSwap] tells what the loader will do.
//
// Do not use this driver with a loader that swaps using offset, which leaves an image of
// the secondary area in another place than it takes one from, nor with one that only
// overwrites the primary area and cannot go back.
//
// # Direct-XIP with revert
//
// With MCUBOOT_DIRECT_XIP and MCUBOOT_DIRECT_XIP_REVERT an image runs where it lies,
// and [Driver] fits: slot 0 is the primary one, slot 1 the secondary one. The
// loader starts the image with the higher version (the primary one if they are
// equal) that has the trailer magic; it marks it by copy_done. If it finds
// copy_done without image_ok, the image was started and not confirmed: it erases
// that slot and takes the other one (mcu-tools/mcuboot,
// boot/bootutil/src/loader.c, boot_select_or_erase).
//
// It follows that only an image with a higher version can be tried; that the slot
// of a failed trial is empty afterwards; and that the factory image needs a
// trailer with image_ok, as made by imgtool sign --pad --confirm. Images must be
// installed without a trailer, through [Driver.Image]: then the loader ignores (and
// erases) them until the trial is stored. The magic is written last, as one program
// operation.
//
// Without the revert option the loader always starts the highest version and
// nothing can be on trial; do not use this driver then.
package mcuboot
