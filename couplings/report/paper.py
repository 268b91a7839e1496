"""What Immiscible Diffusion (arXiv 2406.12303) reports, to stand beside what is measured here.

Its numbers come from CIFAR-10 and its authors' machines: the form is comparable, the values are not.
"""

SOURCE = "Immiscible Diffusion, arXiv 2406.12303"

TABLE_3 = {128: (1.93, 5.4), 256: (2.16, 6.7), 512: (2.32, 8.8), 1024: (2.44, 22.8)}
"""Batch size to reduction of the L2 distance in percent, and milliseconds of an assignment."""

TABLE_4 = {
    "independent": {70.2: 6.30, 93.6: 5.56, 117.0: 4.86, 140.4: 4.34, 163.8: 4.12},
    "l2": {70.2: 5.28, 93.6: 4.56, 117.0: 4.13, 140.4: 3.81, 163.8: 3.70},
    "l1": {70.2: 5.34, 93.6: 4.66, 117.0: 4.16, 140.4: 3.87, 163.8: 3.82},
}
"""Frechet distance of DDIM by thousand training steps."""

TABLE_5 = {
    "independent": {20: 10.03, 50: 6.63, 100: 5.2, 500: 3.91, 1000: 3.82},
    "l2": {20: 7.46, 50: 5.14, 100: 4.32, 500: 3.74, 1000: 3.67},
}
"""Frechet distance of DDIM by sampling steps."""
